"""How facts are stated and asked: frames only, no code (the template language is `grammar.py`).

A sentence is a *direct* frame, or a clause ("the {attr} for {key} is {value}") inside a wrapper ("Remember that
{clause}."). A question is a *direct* frame, or a noun phrase ("the {attr} of {key}") inside a wrapper ("Can you tell me
{np}?"). So a family with 40 clauses and 40 wrappers has 1,600 structures. `Pool.split` holds out every fifth frame of
every list; for synonyms the held-out ones are named.
"""

from __future__ import annotations

from dataclasses import dataclass

from locret.tasks.grammar import Pool

SPEAKER = Pool(
    (
        "[Clara|Hugo|Edith|Oscar|Nora|Felix|Martha|Jonas|Selma|Victor]",
        "the [clerk|captain|porter|teacher|caretaker|editor|old man|guard|nurse|secretary]",
        "[Mr.|Mrs.|Dr.] [Baxter|Holloway|Finch|Drummond|Larsen|Whitaker]",
        "a [friend|neighbour|colleague|visitor|stranger]",
    ),
    ("the [harbour master|accountant|librarian|foreman]", "[Professor|Colonel] [Ogden|Penrose|Sedgwick]"),
)

# Clause -> sentence. Every fifth is held out.
FACT_WRAPPERS = Pool.split(
    [
        "{^clause}.",
        "[Remember|Note|Keep in mind|Do not forget|Bear in mind] that {clause}.",
        "[Please |Kindly |][remember|note|write down]: {clause}.",
        "[Memo|Note|Reminder|Notice|Record|Log entry]: {clause}.",
        "[To whom it may concern|For general information|For your files]: {clause}.",
        "According to [the records|the register|our files|the latest list|the notes|the minutes], {clause}.",
        '"{^clause}," [said|wrote|whispered|explained|repeated] {speaker}.',
        "{^speaker} [said|noted|mentioned|confirmed|insisted|told us] that {clause}.",
        "It [is known|was agreed|was decided|is recorded|was announced] that {clause}.",
        "[Rumour has it|Word went round] that {clause}.",
        "As [everyone knows|we heard|was mentioned before|the list shows], {clause}.",
        "By the way, {clause}.",
        "{^clause}, [as far as we know|according to {speaker}|and that is final|as always].",
        "({^clause}.)",
        "[It so happens|As it turned out, it was true] that {clause}.",
        "Fact: {clause}.",
        "For the record, {clause}.",
        "[The|A|Another] [report|letter|note|message|telegram] [says|states|adds]: {clause}.",
        "P.S. {^clause}.",
        "A [slip of paper|card|sign|label] on the [desk|door|wall|board] [said|read]: {clause}.",
        "[Write this down|Listen|Mark this|Attention|Important]: {clause}.",
        "It should be [remembered|noted|added|kept in mind] that {clause}.",
        "There is one thing to [remember|keep|learn]: {clause}.",
        "[Today|Yesterday|Last week|This morning] we learned that {clause}.",
        "[Should anyone ask|In case somebody asks|If they ask you], {clause}.",
        "{^clause} - this is [important|worth keeping|to be remembered].",
        "[Also|Moreover|Besides|In addition], {clause}.",
        "We [must not|should never|ought not to] forget that {clause}.",
        '"[Remember|Never forget|You should know] that {clause}," {speaker} [said|told me|added].',
        "[Somewhere|On one page] in the [margin|notes] it [says|is written] that {clause}.",
        "[Indeed|In fact|Actually|Of course], {clause}.",
        "{^speaker} [wrote to us|told everyone|reported]: {clause}.",
        "[I|We] [know|have heard|remember|were told|can confirm] that {clause}.",
        "Update: {clause}.",
        "[Let it be known|Be advised|Be aware] that {clause}.",
        "[These days|At present|Now|Still], {clause}.",
        "[Here is|This is] [a fact|a detail|something] [to remember|that matters|for later]: {clause}.",
        "1. {^clause}.",
        "- {clause}",
        "[The inspector|The committee|The council] [established|found|concluded] that {clause}.",
        "[No doubt|Without doubt|Quite certain]: {clause}.",
        "[Some|Many|Most] people [know|forget|are surprised] that {clause}.",
        "{^clause}; [do not lose this|please keep it|everybody knows it].",
        "* {^clause}.",
        "[One|A] [thing|detail] that [nobody disputes|is beyond question]: {clause}.",
    ]
)

# Noun phrase -> question. Every fifth is held out.
NP_WRAPPERS = Pool.split(
    [
        "What is {np}?",
        "Tell me {np}.",
        "[Please |]give [me |us |]{np}.",
        "State {np}.",
        "[I want to know|I should like to learn|I am curious about] {np}.",
        "Can you [tell me|find|look up|give me] {np}?",
        "[Find|Look up|Recall|Write down|Report|Return|Repeat|Quote|Extract] {np}[| from the text|, please].",
        "Do you [remember|know|recall] {np}?",
        "{^np}?",
        "[Could|Would] you [kindly |]remind me of {np}?",
        "{np}?",
        "{^np}:",
        "{^np} is",
        "What was {np}[ again|]?",
        "[What did the text say|What does it say] about {np}?",
        "{^np}, please.",
        "Based on the [text|document|passage] above, what is {np}?",
        "According to the [text|document|notes], what is {np}?",
        "In the [text|document], which one is {np}?",
        "[Which value|What] [is given|is stated|was mentioned] as {np}?",
        "Answer with {np}.",
        "Question: what is {np}? Answer:",
        "Remind me of {np}.",
        "I [need|am looking for|have forgotten|forgot|must know] {np}.",
        "[Fill in the blank|Complete the sentence]: {np} is ___.",
        "Complete: {np} is",
        "[Only|Just|Nothing but] {np}, please.",
        "[Now|Then|Next], what is {np}?",
        "My question is about {np}. What is it?",
        "[Somebody asks|They want to know|I was asked for] {np}. [What do I say?|What should I answer?|What is it?]",
        "Name {np}.",
        "[Earlier|Above|In the text], {np} was mentioned. What is it?",
        "[So |And ]what is {np}?",
        "{^np} - what is it?",
        "[Search|Scan|Check] the [text|document] for {np} and [report|write|give] it.",
        "What [is|was] said to be {np}?",
        "[I have read the text.|You have read the text.|The text is long.] What is {np}?",
        "[Output|Print|Show] {np}.",
        "Please [answer|reply] with {np} [only|and nothing else].",
        "[Is it possible to say what {np} is?|Are you able to say what {np} is?]",
        "What would you [say|answer] if [someone|anybody] asked [you |]for {np}?",
        "[Read|Look at|Go through] the [document|text] again: what is {np}?",
        "Q: {np}?\nA:",
        "Query: {np}",
        "[Let us see|Let me check] whether you [kept|remember] {np}: what is it?",
        "The [text|document] [mentions|contains|states] {np}. What is it?",
    ]
)

# Indirect question ("where Ann Marsh lives") -> question.
INDIRECT_WRAPPERS = Pool.split(
    [
        "Tell me {indirect}.",
        "Can you [tell me|say|find out] {indirect}?",
        "Do you [know|remember|recall] {indirect}?",
        "I [wonder|want to know|would like to know|need to know] {indirect}.",
        "[Please state|Explain in short] {indirect}.",
        "[Please say|Say|Write down] {indirect}.",
        "[Could|Would] you remind me {indirect}?",
        "[Find out|Look up|Check] {indirect}.",
        "I [forgot|have forgotten|no longer know] {indirect}.",
        "[Does the text say|Is it mentioned] {indirect}?",
        "According to the [text|document], {indirect}?",
        "My question is {indirect}.",
        "[Somebody|A friend] asks {indirect}.",
        "[The text says|It was mentioned] {indirect}: what was it?",
        "[Let me know|I must find out] {indirect}.",
    ]
)


EMPTY = Pool((), ())


@dataclass(frozen=True)
class Phrases:
    """The frames of one kind of fact. `direct` and `clauses` state it; `asks`, `nps` and `indirect` ask for it."""

    clauses: Pool
    direct: Pool
    nps: Pool
    asks: Pool
    indirect: Pool = EMPTY
    official_fact: str = ""
    official_ask: str = ""


# ---- key -> number, word or uuid: the same frames, another {attr} ------------------------------------------------

NUMBER = Pool(
    (
        "[special magic |magic |special |secret |access |serial ||||]number",
        "[secret |access |special |security |entry |personal |]code",
        "[special |secret |assigned |correct |]figure",
        "[reference|registration|inventory|catalogue|account|file|ticket] number",
        "[numeric|numerical] code",
        "number",
        "PIN",
        "[secret|magic|registered] numeral",
    ),
    ("[index|control|order|hidden] number", "[numeric key|digit code|lookup number]"),
)
WORD = Pool(
    (
        "[special magic |magic |special |secret |chosen |agreed ||||]word",
        "[secret |special |]password",
        "[magic |secret |]keyword",
        "code word",
        "word",
        "[agreed |secret |]term",
        "watchword",
        "[secret|spoken|chosen] name",
    ),
    ("[hidden|signal|control] word", "[catchword|secret expression|passphrase]"),
)
UUID = Pool(
    (
        "[special magic |magic |special |secret |unique ||]uuid",
        "[unique |secret |]identifier",
        "[record |unique |]id",
        "UUID",
        "[long|unique] key",
    ),
    ("[hidden|control] uuid", "[object|entry] identifier"),
)

KEYED = Phrases(
    clauses=Pool.split(
        [
            "the {attr} for {key} is {value}",
            "the {attr} of {key} is {value}",
            "{key} has the {attr} {value}",
            "{value} is the {attr} for {key}",
            "for {key}, {value} was fixed as the {attr}",
            "{key}'s {attr} is {value}",
            "the {attr} assigned to {key} is {value}",
            "{key} was given the {attr} {value}",
            "{value} was assigned to {key} as its {attr}",
            "{key} got {value} for its {attr}",
            "the {attr} that belongs to {key} is {value}",
            "{key} is [registered|listed|filed|known] under the {attr} {value}",
            "for {key}, the {attr} is {value}",
            "for {key} the {attr} [reads|is set to|has to be] {value}",
            "regarding {key}, one should use the {attr} {value}",
            "the {attr} {value} belongs to {key}",
            "the {attr} {value} is reserved for {key}",
            "whoever asks for {key} must give {value} as the {attr}",
            "{key} uses {value} as its {attr}",
            "behind {key} stands the {attr} {value}",
            "the clerk wrote down {value} as the {attr} of {key}",
            "{key} can be found under the {attr} {value}",
            "the {attr} which [opens|unlocks|identifies] {key} is {value}",
            "in the case of {key}, {value} is the {attr}",
            "{value} [acts|serves] as {key}'s {attr}",
            "it is {value} that serves as the {attr} for {key}",
            "{key} carries the {attr} {value}",
            "{key}, whose {attr} is {value}, [is on the list|comes next|was checked twice]",
            "when it comes to {key}, the {attr} is {value}",
            "to reach {key} you must [give|quote] {value}, its {attr}",
            "they [chose|picked|selected] {value} as the {attr} for {key}",
            "the {attr} [listed|recorded|entered|noted] for {key} is {value}",
            "under {key} the [book|ledger|register|file] lists the {attr} {value}",
            "the [book|ledger|register] gives {value} as the {attr} of {key}",
            "among all entries only {key} bears the {attr} {value}",
            "{value} is what {key} has for its {attr}",
            "anyone looking for the {attr} of {key} should use {value}",
            "the {attr} [connected with|tied to|linked to|associated with] {key} is {value}",
            "{value}, the {attr} of {key}, [has not changed|is still valid|remains in use]",
            "{key} and the {attr} {value} go together",
            "{key} answers to the {attr} {value}",
            "{key} received {value} as its {attr}",
            "they gave {key} the {attr} {value}",
            "one of the {attr}s, {value}, is for {key}",
            "the {attr} {value} will always point to {key}",
            "[somebody|the office] has changed the {attr} of {key} to {value}",
            "the {attr} is {value} for {key}",
            "{key} is the one with the {attr} {value}",
            "as {attr} for {key} [we use|they use|we keep] {value}",
            "the {attr} that goes with {key} happens to be {value}",
        ]
    ),
    direct=Pool.split(
        [
            "{key}: {value}",
            "{key} ({attr}): {value}",
            "{^attr} {key}: {value}",
            "{^attr} of {key} = {value}",
            "{^attr} for {key}: {value}.",
            "{key} - {attr} - {value}",
            "{key} — {value}",
            "| {key} | {attr} | {value} |",
            "Entry: {key}. {^attr}: {value}.",
            "{^attr}: {value} (for {key}).",
            "{^attr} ({key}): {value}.",
            "* {key}: {attr} {value}",
            "Name: {key}; {attr}: {value}.",
            '"What is the {attr} of {key}?" "It is {value}," [said|answered] {speaker}.',
            "Key {key}, {attr} {value}.",
            "Q: What is the {attr} for {key}? A: {value}.",
            "[Use|Take|Enter] {value} as the {attr} for {key}.",
            "[Set|Change] the {attr} of {key} to {value}.",
            "[Give|Assign] {key} the {attr} {value}.",
            "{key} -> {value}",
            "Which {attr} does {key} have? {value}.",
            "{key} = {value}",
            "[Item|Record|Subject]: {key}, {attr}: {value}",
            "Do not confuse the {attr} of {key}: it is {value}.",
            "{value}: {attr} of {key}.",
            "[If you need {key}, ask for|Looking for {key}? Use] the {attr} {value}.",
            "One of the [special |]{attr}s for {key} is: {value}.",
            "The {attr} for {key} is: {value}.",
            "{^speaker} wanted the {attr} of {key}, and the answer was {value}.",
            "{key}, {attr} {value}",
            "[Memo|Note to self|Reminder]: {key}, {attr} {value}.",
            "{^attr} {value} = {key}.",
            "Never forget the {attr} of {key}: {value}!",
            "[Here comes|This is] {key}, {attr} {value}.",
            "[Regarding|Concerning|About] {key}: {attr} {value}.",
        ]
    ),
    nps=Pool.split(
        [
            "the {attr} for {key}",
            "the {attr} of {key}",
            "{key}'s {attr}",
            "the {attr} assigned to {key}",
            "the {attr} which {key} uses",
            "the {attr} that belongs to {key}",
            "the {attr} [given|mentioned|stated|listed|recorded] for {key}",
            "the {attr} [connected with|tied to|linked with|associated with] {key}",
            "the {attr} that {key} has",
            "the {attr} by which {key} is identified",
            "the {attr} {key} was given",
            "the {attr} under which {key} is [registered|listed|filed|known]",
            "the {attr} that [unlocks|opens|identifies] {key}",
            "the {attr} reserved for {key}",
            "the {attr} one needs for {key}",
            "the [correct|right|exact] {attr} for {key}",
            "{attr} of {key}",
            "{attr} for {key}",
        ]
    ),
    asks=Pool.split(
        [
            "What {attr} does {key} have?",
            "What {attr} was {key} given?",
            "Which {attr} belongs to {key}?",
            "Which {attr} is assigned to {key}?",
            "Which {attr} goes with {key}?",
            "For {key}, what is the {attr}?",
            "{key} has which {attr}?",
            "Under which {attr} is {key} [registered|listed|filed|known]?",
            "{key}: what is the {attr}?",
            "With which {attr} is {key} [connected|linked]?",
            "What is the {attr} for {key} mentioned in the [provided text|text|document]?",
            "Some {attr} for {key} was mentioned. What is it?",
            "{key}, {attr}?",
            "{key} {attr}",
            "By what {attr} can one find {key}?",
            "{attr} {key}?",
            "{^attr} of {key}?",
            "The {attr} for {key} mentioned in the provided text is",
            "If I need {key}, which {attr} should I use?",
            "{key} must have some {attr}; which?",
            "[Think of|Take|Consider] {key}. What {attr} does it have?",
            "{key} - {attr}:",
            "What is {key}'s {attr}?",
            "Which {attr} [did the text give for|is listed for|was noted for] {key}?",
            "[Regarding|As to] {key}: its {attr}?",
            "What must I enter as the {attr} for {key}?",
            "Someone wants to reach {key}. Which {attr} do they need?",
            "I am looking for {key}. What is its {attr}?",
            "What do you have as {attr} for {key}?",
            "{key} is on the list with what {attr}?",
            "{^attr} for {key}:",
            "What {attr} do we use for {key}?",
            "Is there any {attr} for {key}? Which one?",
            "What is the special magic {attr} for {key} mentioned in the provided text?",
            "Give the {attr} that stands next to {key}.",
            "| {key} | {attr} |",
            "{key} ({attr}) =",
        ]
    ),
)

OFFICIAL_KEYED = {  # RULER (arXiv:2404.06654), singular forms
    "number": "One of the special magic numbers for {key} is: {value}.",
    "word": "One of the special magic words for {key} is: {value}.",
    "uuid": "One of the special magic uuids for {key} is: {value}.",
}
OFFICIAL_KEYED_ASK = {
    "number": "What is the special magic number for {key} mentioned in the provided text?",
    "word": "What is the special magic word for {key} mentioned in the provided text?",
    "uuid": "What is the special magic uuid for {key} mentioned in the provided text?",
}
OFFICIAL_MULTIVALUE_ASK = "What are all the special magic {attr}s for {key} mentioned in the provided text?"
MULTIVALUE_ASKS = Pool.split(
    [
        "What are all the {attr}s for {key}?",
        "[List|Name|Give|Write down|Tell me] all [the |]{attr}s [of|for] {key}.",
        "Which {attr}s does {key} have?",
        "{key} has several {attr}s. [What are they?|List them.]",
        "What {attr}s were [mentioned|listed|given] for {key}?",
        "Every {attr} of {key}, [in order|separated by commas], please.",
        "All {attr}s for {key}:",
        "[Find|Collect] every {attr} that belongs to {key}.",
        "What are the {attr}s of {key}?",
        "[Please enumerate|Enumerate] the {attr}s [of|for] {key}.",
        "Which {attr}s are [assigned|connected] to {key}? [Give all of them.|List all.]",
        "{^attr}s of {key}?",
        "[I need|Give me] the {attr}s of {key}, all of them.",
        "The {attr}s for {key} are",
        "How many {attr}s has {key}, and which? List only the {attr}s.",
    ]
)

# ---- the pass key: one a document, no key -------------------------------------------------------------------------

PASSKEY_ATTR = Pool(
    (
        "pass key",
        "pass key",
        "passkey",
        "[entry|unlock|master|main] key",
        "pass code",
        "passcode",
        "[gate|door|vault] [code|key]",
        "key to the [vault|gate|archive]",
    ),
    ("[opening|final] key", "[safe|lock] code"),
)
PASSKEY = Phrases(
    clauses=Pool.split(
        [
            "the {attr} is {value}",
            "{value} is the {attr}",
            "the {attr} [has been|was|is] set to {value}",
            "the {attr} reads {value}",
            "for the {attr} one must take {value}",
            "you [need|must use] {value} as the {attr}",
            "the {attr} to remember is {value}",
            "only {value} works as the {attr}",
            "the {attr} was changed to {value}",
            "{value} turned out to be the {attr}",
            "your {attr} will be {value}",
            "the [correct|right|valid|current|only] {attr} is {value}",
            "the {attr} that everyone needs is {value}",
            "they chose {value} as the {attr}",
            "no other {attr} than {value} was accepted",
            "without the {attr} {value} nobody gets in",
            "the {attr} for [today|this week|this month] is {value}",
            "the {attr} everybody was looking for is {value}",
            "the {attr}, {value}, must be kept safe",
            "one gets in with {value} as the {attr}",
            "the lock opens with the {attr} {value}",
            "it is {value} that serves as the {attr}",
            "{value} will be used as the {attr}",
            "the {attr} in use is {value}",
            "the digits {value} make up the {attr}",
            "the {attr} hidden in this text is {value}",
            "the guard accepts only the {attr} {value}",
            "the {attr} consists of the digits {value}",
            "the new {attr} is called {value}",
            "someone wrote the {attr} {value} on the wall",
        ]
    ),
    direct=Pool.split(
        [
            "The {attr} is {value}. Remember it. {value} is the {attr}.",
            "{^attr}: {value}",
            "{^attr} = {value}",
            "[Remember|Keep] the {attr}: {value}.",
            "[Use|Enter|Type|Take] {value} as the {attr}.",
            "[Use|Enter|Type] the {attr} {value}.",
            "{^attr} - {value}",
            '"The {attr}?" "It is {value}," said {speaker}.',
            "{value} ({attr})",
            "[Memorise|Learn] this {attr}: {value}.",
            "The {attr} is {value}.",
            "The {attr} is: {value}",
            "{value} is the {attr}. Remember it.",
            "[Attention|Important]! {^attr}: {value}.",
            "What is the {attr}? {value}, of course.",
            "[Here is|This is] the {attr}: {value}.",
            "[To get in|To open the door|To enter], [type|say|use] {value}, the {attr}.",
            "Do not forget the {attr}, {value}.",
            "[Set|Change] the {attr} to {value}.",
            "{^attr}, as agreed: {value}.",
        ]
    ),
    nps=Pool.split(
        [
            "the {attr}",
            "the {attr} [mentioned|given|stated|hidden] in the text",
            "the {attr} we were told to remember",
            "the [correct|right|current] {attr}",
            "the {attr} that works",
            "the {attr} from the [text|document] above",
            "{attr}",
            "the {attr} to remember",
            "the {attr} one needs",
            "the digits of the {attr}",
        ]
    ),
    asks=Pool.split(
        [
            "What {attr} was given?",
            "Which {attr} was mentioned?",
            "{^attr}?",
            "What is the {attr}? The {attr} is",
            "With what {attr} does one get in?",
            "The {attr} is",
            "Which {attr} do I [need|enter|use]?",
            "What did they [choose|set] as the {attr}?",
            "There is one {attr} in the text. [What is it?|Find it.]",
            "Which digits form the {attr}?",
            "How does the {attr} read?",
            "{attr}",
            "Which number is the {attr}?",
            "What do I [type|enter] as the {attr}?",
            "Which {attr} must be remembered?",
            "One {attr} is hidden in the text above. Write it down.",
            "{^attr}:",
            "What was the {attr} again?",
            "Do you remember which {attr} was given?",
            "I was told some {attr}. What was it?",
        ]
    ),
    official_fact="The pass key is {value}. Remember it. {value} is the pass key.",
    official_ask="What is the pass key?",
)

# ---- variable chains ----------------------------------------------------------------------------------------------

CHAIN_DEFINE = Pool.split(
    [
        "VAR {name} = {value}",
        "{name} = {value}",
        "let {name} = {value}",
        "Set {name} to {value}.",
        "Put {value} in {name}.",
        "The variable {name} is [set|equal] to {value}.",
        "{name} := {value}",
        "[Assign|Give] {value} to {name}.",
        "{name} holds the value {value}.",
        "{name} is assigned {value}.",
        "Store {value} in {name}.",
        "The value of {name} is {value}.",
        "Variable {name} has the value {value}.",
        "{name} equals {value}.",
        "{name} starts out as {value}.",
    ]
)
CHAIN_LINK = Pool.split(  # line by line the counterparts of CHAIN_DEFINE
    [
        "VAR {name} = VAR {source}",
        "{name} = {source}",
        "let {name} = {source}",
        "Set {name} to {source}.",
        "Put {source} in {name}.",
        "The variable {name} is [set|equal] to the variable {source}.",
        "{name} := {source}",
        "[Assign|Give] {source} to {name}.",
        "{name} holds the same value as {source}.",
        "{name} is assigned whatever {source} has.",
        "Store {source} in {name}.",
        "The value of {name} is that of {source}.",
        "Variable {name} has the value of variable {source}.",
        "{name} equals {source}.",
        "{name} copies {source}.",
    ]
)
CHAIN_NPS = Pool.split(
    [
        "the value of [VAR |variable |the variable |]{name}",
        "the value [that|which] [VAR |]{name} holds",
        "the number [stored|held] in {name}",
        "the value assigned to [VAR |]{name}",
        "what {name} [finally |]contains",
        "the [final |]value of {name}",
        "{name}'s value",
        "the number {name} stands for",
        "[VAR |]{name}",
        "the [number|result] behind {name}",
    ]
)
CHAIN_ASKS = Pool.split(
    [
        "What is the value of VAR {name}?",
        "What value does [VAR |the variable |]{name} have?",
        "Which number is stored in [VAR |]{name}?",
        "What does {name} [equal|hold|contain]?",
        "To what number does {name} evaluate?",
        "[VAR |]{name} = ?",
        "{name} is equal to which number?",
        "Follow the assignments: what is {name}?",
        "print({name})",
        "Which value does {name} end up with?",
        "VAR {name} =",
        "Which number is [VAR |]{name}?",
        "[Resolve|Evaluate|Compute] {name}.",
        "After all assignments, what is {name}?",
        "In the end, {name} is worth how much?",
        "If we print {name}, which number appears?",
        "Which value was [assigned|given] to {name}?",
        "Trace {name} back to its number.",
        "{name}?",
        "Replace {name} by its number.",
    ]
)
CHAIN_OFFICIAL = 0  # the first of the lists above

# ---- dense key-value documents ------------------------------------------------------------------------------------

KV_ASKS = Pool.split(
    [
        'Key: "{key}"\nThe value associated with the specified key is:',
        "What is the value of {key}?",
        'Which value belongs to the key "{key}"?',
        "{key}",
        "What stands next to {key}?",
        '"{key}":',
        "[Look up|Find|Return|Give] the value for the key {key}.",
        "Key: {key}. Value?",
        "What value does the key {key} map to?",
        "With what is {key} paired?",
        "Extract the value of {key}[ from the data above|].",
        "[What is|Tell me] the value stored under {key}?",
        'data.get("{key}")',
        "For the key {key}, what is the value?",
        "Which string follows {key}?",
        "Value for {key}:",
        "{key} -> ?",
        "Which entry has the key {key}, and what is its value? Give the value only.",
        "[I need|Please give me] the value [of|for] {key}.",
        "[Retrieve|Fetch] what was saved as {key}.",
    ]
)
