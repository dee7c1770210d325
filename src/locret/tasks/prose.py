"""A procedural writer of readable English: travel reports, chronicles, engineering logs, histories of harbour towns.

All of it is this project's own. It serves as filler where no corpus is at hand: demo documents, tests, offline
training. A section has a heading, a place, a ship and a few people, so that its sentences belong together. No sentence
says where a person with first and last name lives or works, and no key has a number: the prose cannot contradict a
planted fact.
"""
# ruff: noqa: E501, SIM905  (a frame is one line, however long; a list of words reads better as a string)

from __future__ import annotations

import random

from locret.tasks.grammar import Pool, fill, flatten, parse

_NAMES = (
    "Orrin Tamsin Bellweather Quillon Marrable Thackwell Osgood Pellam Wexcombe Averil Dorrance Hathersage Lorrimer Mossop Penhallow "
    "Ravenhill Stannard Tregarth Umbers Verrall Winstanley Yarrow Ambler Brockbank Cattermole Dunnage Easterbrook Fothergill"
).split()
_TITLES = "Captain Miss Mrs. Mr. Doctor Pilot Engineer Mayor Widow Sergeant Master Warden".split()
_PLACES = (
    "Grayhaven Saltmouth Northwick Oldharbour Kettlestrand Marrowby Quayside Easterholm Thornwater Lowstrand Pikesbridge Cairnfoot "
    "Wintersea Goosewell Brackenfirth Sandrick Holmestead Ferrybank Cutterham Stillwater"
).split()
_SHIPS = "Patient Gull|Second Spring|Margarite|Iron Duchess|Blue Heron|Northern Hope|Widow's Son|Silver Thimble|Old Constance|Evening Tide".split(
    "|"
)
_RIVERS = "Lorn Wend Arrow Silk Tarn Mere Ousel Brand Tolland Kelder".split()

_SUBS: dict[str, tuple[str, ...]] = {
    "season": ("[spring|summer|autumn|winter]", "[early|late|a mild|a cold|a wet|a dry] [spring|summer|autumn|winter]"),
    "time": (
        "[that|one|the next] [morning|evening|afternoon|night]",
        "[shortly|an hour|some minutes] [before|after] [dawn|noon|sunset|midnight]",
        "[in the course of|towards the end of|at the beginning of] the [week|month|season|year]",
        "[three|four|five|several|many] [days|weeks|months|years] later",
        "on [Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday]",
        "as soon as the [fog|rain|frost|storm] had [lifted|passed]",
    ),
    "weather": (
        "the [wind|sea|sky|fog|rain|frost] [grew heavier|gave way|turned milder|stayed as it was|made work difficult]",
        "a [thin|grey|steady|cold|warm] [rain|mist|wind|light] [came down from the hills|lay over the water|filled the streets]",
        "the [clouds|waves|gusts] [came in rows|seemed endless|broke at last|moved inland]",
        "it [rained|snowed|thundered|was quite still] [all day|until evening|for an hour|beyond the bar]",
    ),
    "goods": (
        "[timber|salt|wool|coal|grain|slate|tar|rope|barrels of herring|lamp oil|bricks|cider|copper plates|linen]",
        "[bales|crates|sacks|loads] of [wool|tea|flour|nails|paper|hemp|apples|glass|seed]",
    ),
    "building": (
        "the [old|new|lower|upper|stone|wooden] [custom house|mill|bridge|warehouse|school|chapel|lighthouse|boathouse|market hall|granary]",
        "the [rope walk|fish market|dry dock|town hall|signal tower|brick kiln|pump house|weighing house]",
    ),
    "crowd": (
        "the [fishermen|merchants|carters|dockers|children|widows|farmers|pilots|masons|sailmakers]",
        "[most|some|a few|hardly any|nearly all] of the [townspeople|guests|workers|sailors|passengers]",
        "the [council|guild|crew|garrison|committee|parish]",
    ),
    "machine": (
        "the [main|spare|left|right|upper|lower|second] [pump|boiler|valve|crane|winch|gear|shaft|turbine|compressor|bearing|gauge|belt]",
        "the [steam engine|dredger|drawbridge motor|hoist|governor|cooling pipe|lamp mechanism|diving bell]",
    ),
    "fault": (
        "[leaked|rattled|overheated|jammed|lost pressure|slipped|ran dry|stopped|vibrated|hissed]",
        "[made a noise like a kettle|gave less than half its power|had to be taken apart|worked better than expected]",
    ),
    "manner": ("[slowly|quietly|without haste|at once|with great care|in good order|under protest|by hand|by lamplight|against advice|for no clear reason|as usual]",),
    "land": (
        "[hills|meadows|marshes|orchards|cliffs|dunes|moors|fields|woods]",
        "[low|bare|green|steep|dark|gentle] [hills|slopes|cliffs|banks|woods|fields]",
    ),
    "adj": ("[old|narrow|quiet|crowded|pleasant|windy|honest|stubborn|plain|handsome|poor|proud|modest|busy|forgotten|famous]",),
    "food": ("[bread and cheese|fish soup|smoked eel|boiled potatoes|black tea|barley porridge|cold mutton|apple cake|onions and butter|hot cider]",),
    "count": ("[two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|a dozen|several|many|hardly any]",),
    "thing": ("[a letter|a lantern|a map|an umbrella|a ledger|a small bell|a coil of rope|a broken oar|a tin box|a brass compass|a wet coat|a loaf]",),
    "feeling": ("[relieved|uneasy|tired|content|amused|ashamed|hopeful|puzzled|cheerful|silent|suspicious|grateful]",),
    "reason": (
        "because [the tide would not wait|nobody had paid the toll|the road was under water|the keys were missing|the season was nearly over]",
        "since [the ice was already thin|the money was spent|the old charts could not be trusted|no one had a better plan]",
        "for [the horses were tired|the harbour was full|the law did not forbid it|habit is strong in such places]",
    ),
}  # fmt: skip

_TRAVEL = (
    "{^time}, we reached {place} [by the coast road|on foot|by boat|with the mail coach|in pouring rain].",
    "The road from {place} follows the {river} for {count} miles and then [climbs into|crosses|avoids] the {land}.",
    "{^weather}, and we were {feeling} when {building} came into sight.",
    "Of {place} I can say that it is {adj} and {adj}, and that its people [eat well|talk little|rise early|dislike strangers|are fond of music].",
    "We [dined on|were given|bought|shared] {food} at an inn whose sign showed [a swan|two keys|a bear|the moon|a ploughman].",
    "{^crowd} [stared at us|took no notice of us|wished us a good journey|asked for news from the capital].",
    "From the top one sees {land}, the bend of the {river}, and [far off|behind it|to the west] the sea.",
    "Our guide, {person}, carried {thing} and [never explained why|used it twice|lost it at the ford|would not lend it].",
    "[Nothing|Little|Much] remains of {building} that earlier travellers [praised|described|drew|complained about].",
    "I slept {manner}, woke {feeling}, and found that {weather}.",
    "Whoever comes to {place} in {season} should bring {thing} and [patience|good boots|a warm coat|small coins].",
    "The ferry across the {river} takes {count} people and [one horse|no carts|a great deal of luggage|whoever pays].",
    "{^person} told me that {crowd} once [walked|rowed|drove sheep|carried a piano] from here to {place} {reason}.",
    "Beyond the last houses the {land} begin, and with them [the silence|the wind|the smell of peat|the sound of bells].",
    "[How|Why] {building} came to stand in so {adj} a spot, {crowd} could not tell us.",
    "We left {manner}, {reason}.",
)
_CHRONICLE = (
    "In the {ordinal} year of the new dike, {crowd} [elected|dismissed|fined|honoured] {person} {reason}.",
    "{^building} was [built|burned down|sold|repaired|painted white|struck by lightning] in {season}.",
    "It is written that {crowd} [quarrelled over|shared|buried|auctioned] {goods} {manner}.",
    "{^time}, the bells of {place} rang, and {crowd} [ran to the quay|stayed indoors|lit fires on the {land}|fell on their knees].",
    "For {count} winters no ship came, and {food} was all that {crowd} had.",
    "The price of {goods} rose until {person} opened the stores {manner}.",
    "A fire [began in|spread to|spared] {building}; {weather}.",
    "The treaty between {place} and {place2} was [signed|broken|read aloud|forgotten] {time}.",
    "{^person} left the town [a clock|a debt|a library|two cows|a song] and was [mourned|forgiven|missed] by {crowd}.",
    "After the flood the {river} ran in a new bed, and {building} stood [on an island|in a field|alone].",
    "Of the {count} families named in the old roll, [few|none|most] can be found in {place} today.",
    "{^crowd} refused to pay [the toll|the tithe|for the bridge], {reason}.",
    "The same year saw [a comet|a great catch|a hard frost|a wedding of note|an outbreak of fever], which {crowd} took for a sign.",
    "What {person} promised, {person2} undid; so the chronicle of {place} puts it.",
    "When {season} came, {goods} lay on the quay, and nobody [dared|cared|was able] to move them.",
    "[No|One] portrait of {person} survives; it [hangs in|was taken from|was found behind] {building}.",
)
_LOG = (
    "{^machine} {fault} {time}.",
    "Inspected {machine}; it {fault}, {reason}.",
    "Replaced the [seal|bolt|washer|chain|filter|lamp|wire] on {machine} and tested it {manner}.",
    "Pressure [fell|rose|stayed level] while {weather}.",
    "{^person} reports that {machine} {fault} again.",
    "Crew of {count} worked {manner} until {machine} could be [started|closed|raised|lifted out].",
    "[Request|Ordered|Received|Still waiting for] {goods} and a new [handle|gasket|drum|cable] for {machine}.",
    "Noise in {machine} [traced to|not explained by|gone after work on] {machine2}.",
    "Stopped work {time} {reason}.",
    "The drawing shows {machine} to the left of {machine2}, but [on site it is the other way round|nobody had checked|the drawing is old].",
    "[Oil|Water|Steam|Sand] found [under|inside|behind] {machine}; {person} cleaned it {manner}.",
    "Test run: {machine} {fault} after {count} minutes, then [recovered|stopped for good|ran smoothly].",
    "Night shift [quiet|short of hands|without light]; {weather}.",
    "We [agree|doubt|suspect] that {machine} was never meant for {goods}.",
    "{^person} and {person2} [disagree about|measured|signed for] {machine}; entry made {manner}.",
    "All [tools|lamps|spare parts] counted; {thing} is missing from {building}.",
)
_HARBOUR = (
    "The {ship} came in {time} with {goods} and a crew of {count}.",
    "{^crowd} of {place} lived on {goods}, and {goods2} made a few of them rich.",
    "A [lamp|flag|gun|whistle] on {building} told the pilots [when to cross the bar|which channel was open|that the fleet was home].",
    "{^person} owned {count} boats and half of {building}.",
    "The harbour silted up {reason}, and the {ship} had to unload in the roads.",
    "Ships for {place} took {goods} out and brought {goods2} back.",
    "In a storm {time} the {ship} lost [her mast|her anchor|two boats|her figurehead], but {crowd} saved every soul.",
    "The quay was [lengthened|raised|paved|lit with gas] {count} years before the railway came.",
    "On market days {crowd} [filled|avoided|decorated|swept] the square before {building}.",
    "The {adj} harbour office kept [a tide table|a list of wrecks|a stove|a parrot] that {person} [was proud of|looked after|never trusted].",
    "[Rope|Sail|Barrel|Net] making employed {count} people in {place} and [smelled of tar|paid badly|went on in winter|died out slowly].",
    "When the {river} froze, {crowd} walked out to the {ship} and [sold|bought|stole] {food}.",
    "Where {building} stands today there was once [a beach|a duck pond|a row of cottages|a gallows].",
    "The pilot {person} knew [every rock|each eddy|all the lights] between {place} and {place2} and steered {manner}.",
    "They launched the {ship} {time}, {reason}.",
    "[Storms|Smugglers|Taxes|Gulls] were the [chief worry|favourite subject|curse|pride] of {place}.",
)
_COMMON = (
    "{^weather}.",
    "{^person} found {thing} near {building} and kept it.",
    "Nobody was {feeling}, except perhaps {person}.",
    '"[I have seen worse|That will do|Leave it to me|It cannot last|Ask me tomorrow]," said {person}, and looked {feeling}.',
    '"[Do you hear|Can you see|Have you thought of] {building}?" asked {person}.',
    "[Still|However|Meanwhile|Besides], {crowd} went on {manner}.",
    "What happened next is [not certain|well known|told in several ways|best left out].",
    "Everyone was given {food}, and {person} sang.",
    "{^person}, who was {feeling}, [turned back|said nothing|bought the drinks|wrote it all down].",
    "The smell of {goods} was everywhere.",
    "[Some|Others|Old people] say it was {person2} who did it, {reason}.",
    "By {season} everything had changed, or so {crowd} thought.",
)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "travel": (_TRAVEL, ("A journey to {place}", "Along the {river}", "From {place} to {place2}", "Notes on the road", "[Three|Five] days in {place}")),
    "chronicle": (_CHRONICLE, ("The chronicle of {place}", "Years of {person}", "How {building} was lost", "The quarrel with {place2}", "Old and new {place}")),
    "log": (_LOG, ("Engineering log", "Work on {machine}", "Report from {building}", "Repairs in {season}", "Shift notes")),
    "harbour": (_HARBOUR, ("The harbour of {place}", "The {ship}", "Trade in {goods}", "Tides and pilots", "{place} and the sea")),
}  # fmt: skip
_POOLS = {name: Pool(options, ()) for name, options in _SUBS.items()}
_POOLS["ordinal"] = Pool(("[first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth]",), ())
for _twin in ("goods", "machine"):
    _POOLS[f"{_twin}2"] = _POOLS[_twin]


class _Section:
    """One kind of text about a place, a river, a ship and three people; frames do not repeat until all were used."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.kind = rng.choice(sorted(KINDS))
        self.places = rng.sample(_PLACES, 3)
        self.people = [f"{rng.choice(_TITLES)} {name}" for name in rng.sample(_NAMES, 4)]
        self.ship, self.river = rng.choice(_SHIPS), rng.choice(_RIVERS)
        self.left: list[str] = []

    def sentence(self) -> str:
        """The next sentence."""
        if not self.left:
            self.left = [*KINDS[self.kind][0], *self.rng.sample(_COMMON, 7)]
            self.rng.shuffle(self.left)
        return self._write(self.left.pop())

    def heading(self) -> str:
        """A title for the section."""
        text = self._write(self.rng.choice(KINDS[self.kind][1]))
        return text[0].upper() + text[1:]

    def _write(self, frame: str) -> str:
        first, second = self.rng.sample(self.people, 2)
        place, other = self.rng.choices(self.places, (6, 1, 1))[0], self.rng.choice(self.places[1:])
        other = other if other != place else self.places[0]
        slots = {
            "place": place,
            "place2": other,
            "ship": self.ship,
            "river": self.river,
            "person": first,
            "person2": second,
        }
        return fill(flatten(self.rng, parse(frame), _POOLS, "any"), slots, ()).text


def write(rng: random.Random, num_sentences: int) -> list[str]:
    """So many sentences of varied prose, without headings.

    >>> write(random.Random(0), 2) == write(random.Random(0), 2)
    True
    """
    out: list[str] = []
    while len(out) < num_sentences:
        section = _Section(rng)
        out += [section.sentence() for _ in range(min(rng.randrange(12, 40), num_sentences - len(out)))]
    return out


def document(rng: random.Random, num_sentences: int) -> str:
    """A text of so many sentences, in sections with headings and paragraphs of three to eight sentences."""
    blocks: list[str] = []
    left = num_sentences
    number = 0
    while left > 0:
        section = _Section(rng)
        number += 1
        blocks.append(f"{number}. {section.heading()}" if rng.random() < 0.3 else f"## {section.heading()}")
        for _ in range(rng.randrange(3, 7)):
            size = min(rng.randrange(3, 9), left)
            if size > 0:
                blocks.append(" ".join(section.sentence() for _ in range(size)))
                left -= size
    return "\n\n".join(blocks)
