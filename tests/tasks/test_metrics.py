"""Metrics: worked examples of each published scorer, gold answers score 100, wrong ones 0, misuse is said."""

from __future__ import annotations

import pytest

from locret.errors import ConfigError, DataError
from locret.tasks import rouge
from locret.tasks.metrics import CORPUS, METRICS, check, corpus_score, longbench_e, normalize, score

# metric, prediction, answers, score: worked by hand from the published code
WORKED = [
    ("exact_match", "The  Cat!", ["cat"], 100),
    ("exact_match", "a cat sat", ["cat"], 0),
    ("exact_match_line", "\n12\nlabel: 13", ["12"], 100),
    ("contains", "It is PARIS.", ["paris", "rome"], 100),
    ("token_f1", "the red big cat", ["a big cat"], 80),  # 2 of 3 found, 2 of 2 wanted
    ("token_f1", "blue", ["a big cat", "Blue sky"], 200 / 3),
    ("word_recall", "sit in a park", ["eat and sit in the park"], 50),
    ("word_prefix", "one two four three", ["one two three four"], 50),
    ("word_prefix", "two one", ["one two"], 0),
    ("string_match_all", "\n1234567 and 7654321", ["1234567", "7654321", "1111111", "2222222"], 50),
    ("string_match_all", "FOO\x00BAR", ["foobar"], 0),  # control characters become line ends
    ("string_match_part", "the Norman Conquest", ["Norman", "1066"], 100),
    ("infinitebench_first_number", "is 01234. not 5", ["01234"], 100),
    ("infinitebench_first_number", "5 or 01234", ["01234"], 0),
    ("infinitebench_kv", '{"ab-cd"}', ["ab-cd"], 100),
    ("infinitebench_kv", "xab-cd", ["ab-cd"], 0),
    ("infinitebench_math_find", "about 42, or 43", ["42"], 100),
    ("infinitebench_math_find", "49.50", ["49.5"], 100),
    ("infinitebench_math_find", "42.5", ["42"], 0),
    ("infinitebench_math_calc", "[1, 4, 9, 8]", ["1", "4", "8", "8"], 50),
    ("infinitebench_code_run", "The value is: -12.", ["-12"], 100),
    ("infinitebench_code_run", "-12 is it", ["-12"], 0),
    ("infinitebench_code_debug", "B. f", ["f", "B"], 100),
    ("infinitebench_code_debug", "The answer is: option `f`", ["f", "B"], 100),
    ("infinitebench_code_debug", "the answer is: f", ["f", "B"], 100),
    ("infinitebench_choice", "C", ["Red", "C"], 100),
    ("infinitebench_choice", "so answer is: C", ["Red", "C"], 100),
    ("infinitebench_choice", "so: C or D", ["Red", "C"], 100),
    ("infinitebench_choice", "", ["Red", "C"], 0),
    ("infinitebench_dialogue", "maybe ANNA: or Tom", ["TOM"], 100),
    ("infinitebench_dialogue", "Tommy", ["TOM"], 0),
    ("infinitebench_qa_zh", "北京。", ["北京市"], 80),
    ("longbench_count", "5 or 6", ["6"], 50),
    ("longbench_retrieval", "Paragraph 12", ["Paragraph 12"], 100),
    ("longbench_retrieval_zh", "段落3 4", ["段落3"], 50),
    ("longbench_code", "# c\nx = 1", ["x = 1"], 100),
    ("longbench_code", "abcd", ["abxx"], 50),
    ("longbench_classification", "Food or Sport\nArt", ["Food", "Food", "Sport", "Art"], 50),
    ("longbench_classification", "Food item", ["Food item", "Food item", "Food"], 100),
    ("longbench_qa_f1_line", "\ncat\ndog", ["cat"], 100),
    ("longbench_rouge_line", "one two\nthree", ["one two"], 100),
    ("longbench_v2", "**The correct answer is (C)**", ["C"], 100),
    ("longbench_v2", "The correct answer is D.", ["C"], 0),
    ("longbench_v2", "C", ["C"], 0),
    ("leval_choice", "I think C, not A", ["C"], 100),
    ("leval_choice", "none", ["A"], 100),  # the published guess
    ("leval_choices", "AC", ["ACD. because"], 25),
    ("leval_choices", "ACD", ["ACD"], 100),
    ("leval_math", "so 3 + 4. The answer is 7.", ["... The answer is 7"], 100),
    ("leval_code", "The final output will be [1, 2]", ["[1, 2]"], 100),
    ("leval_match", "It is the Role of Sport", ["the role of sport"], 100),
    ("leval_judge", "True.", ["True [fact: False]"], 100),
    ("leval_judge", "it is false", ["True [fact: False]"], 0),
    ("helmet_sub_em", "it is the Blue one", ["blue"], 100),
    ("helmet_json_kv", "Corresponding value: ab-cd", ["ab-cd"], 100),
    ("helmet_icl", "label: 7\nlabel: 8", ["7"], 100),
    ("babilong", "The most recent location of Mary is kitchen. Not garden.", ["kitchen", "garden", "office"], 100),
    ("babilong", "kitchen or garden", ["kitchen", "garden", "office"], 0),
    ("scbench_kv", "xab-cdx", ["ab-cd"], 100),
    ("scbench_any", "it is Tom", ["TOM", "ANN"], 100),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "prediction", "answers", "expected"), WORKED)
def test_worked_examples(metric, prediction, answers, expected):
    assert score(metric, prediction, answers) == pytest.approx(expected)


# answers that a metric reads as more than texts
SPECIAL = {
    "infinitebench_math_find": (["42"], "42"),
    "infinitebench_math_calc": (["1", "2"], "1, 2"),
    "infinitebench_code_run": (["-3"], "-3"),
    "infinitebench_kv": (["ab-cd"], "ab-cd"),
    "infinitebench_code_debug": (["f", "B"], "B."),
    "infinitebench_choice": (["Red", "B"], "B"),
    "longbench_classification": (["Food", "Food", "Art"], "Food"),
    "longbench_retrieval": (["Paragraph 3"], "Paragraph 3"),
    "longbench_retrieval_zh": (["段落3"], "段落3"),
    "longbench_v2": (["B"], "The correct answer is (B)"),
    "longbench_count": (["7"], "7"),
    "infinitebench_first_number": (["12345"], "12345"),
    "infinitebench_dialogue": (["TOM"], "Tom"),
    "leval_choice": (["B"], "B"),
    "leval_choices": (["B"], "B"),
    "leval_math": (["The answer is 7"], "The answer is 7"),
    "leval_judge": (["True [fact: x]"], "True"),
    "leval_code": (["5"], "5"),
}
PACKAGES = {"longbench_qa_f1_zh", "longbench_rouge_zh", "scbench_repoqa"}  # need some; repoqa: test_repoqa.py


@pytest.mark.parametrize("metric", sorted(set(METRICS) - PACKAGES))
def test_gold_scores_100_and_something_else_0(metric):
    answers, gold = SPECIAL.get(metric, (["blue garden fence"], "blue garden fence"))
    assert score(metric, gold, answers) == pytest.approx(100, abs=1e-5)
    wrong = {"leval_judge": "False", "leval_choices": "C", "longbench_code": "QQQ#"}.get(metric, "qqq 8888")
    assert score(metric, wrong, answers) == 0


def test_chinese_metrics_cut_words_or_say_what_is_missing():
    try:
        import jieba  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install jieba"):
            score("longbench_qa_f1_zh", "北京", ["北京"])


def test_rouge_worked_by_hand():
    """Unigrams 3 of 4 and 3 of 3; bigrams 1 of 3 and 1 of 2; the subsequence "a c" is 2 long."""
    assert rouge.rouge_n("c a b x", "a b c", 1) == pytest.approx(2 * 0.75 / 1.75)
    assert rouge.rouge_n("c a b x", "a b c", 2) == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert rouge.rouge_l("x a y c", "a b c") == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    # Lin 2004, section 3.2: the union of "w1 w2" and "w1 w3 w5" is four of five words
    assert rouge.rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(2 * 0.4 * 0.8 / 1.2)
    assert rouge.rouge_lsum("a b", "a\na") == pytest.approx(0.5)  # one "a" is found once
    # distinct words only: "a a b" has two
    assert rouge.summary_l("a a b", "a. b") == pytest.approx(1.0, abs=1e-6)
    assert rouge.summary_l("", "a") == 0.0


def test_leval_rouge_of_a_corpus_is_the_geometric_mean_of_means():
    predictions, answers = ["a b c", "x y z"], [["a b c"], ["a b c"]]
    assert corpus_score("leval_rouge", predictions, answers) == pytest.approx(50)
    assert set(CORPUS) <= set(METRICS)
    assert corpus_score("contains", predictions, answers) == 50


def test_longbench_e_groups_by_words():
    assert longbench_e([100, 0, 50, 10], [3999, 100, 4000, 9000]) == {"0-4k": 50, "4-8k": 50, "8k+": 10}


def test_normalization_is_squads():
    assert normalize(" The (Big)  apple, an  Egg ") == "big apple egg"


@pytest.mark.parametrize(
    ("metric", "answers", "error", "message"),
    [
        ("rougel", ["x"], ConfigError, "did you mean 'rouge_l'"),
        ("contains", [], DataError, "at least one answer"),
        ("contains", "text", DataError, "a list"),
        ("infinitebench_choice", ["B"], DataError, "a letter A to D"),
        ("infinitebench_math_find", ["many"], DataError, "compares numbers"),
        ("longbench_classification", ["Food", "Art"], DataError, "all classes"),
        ("longbench_retrieval", ["12"], DataError, "Paragraph"),
    ],
)
def test_misuse_is_said_before_a_model_runs(metric, answers, error, message):
    with pytest.raises(error, match=message):
        check(metric, answers)
