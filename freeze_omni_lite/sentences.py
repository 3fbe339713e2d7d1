"""What is said in our data: questions with reference answers, free sentences, talk not meant for the system.

Everything is a pure function of a seed. A test question pairs a test entity (one in four, held out of all
training questions) with a test wording (held out too); test sentences use templates of their own. Names of
countries and cities do occur in training sentences, so that a recogniser has met the word, never the text.
Used by: samples.py. Numbers are spelled out, so what is written is what is heard.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question. `answers` are accepted strings, lower case; empty if there is no single right answer.

    `cut` is the number of words after which the question is still incomplete: a speaker may pause or break
    off there. `topic` and `entity` say what it is about.
    """

    text: str
    topic: str
    entity: str
    answers: tuple[str, ...] = ()
    cut: int = 0

    def accepts(self, answer: str) -> bool:
        """Whether `answer` contains one of the accepted strings as whole words."""
        spoken = f" {' '.join(re.findall(r'[a-z]+', answer.lower()))} "
        return any(f" {accepted} " in spoken for accepted in self.answers)


@dataclass(frozen=True)
class Topic:
    """Wordings with one slot {x}, and what may fill it: entity -> accepted answers."""

    facts: dict[str, tuple[str, ...]]
    train: tuple[str, ...]
    test: tuple[str, ...]


def facts(block: str) -> dict[str, tuple[str, ...]]:
    """ "France: Paris; Bolivia: Sucre|La Paz" -> {"France": ("paris",), "Bolivia": ("sucre", "la paz")}."""
    pairs = (item.split(":") for item in " ".join(block.split()).split(";") if item.strip())
    return {
        name.strip(): tuple(a.strip().lower() for a in answers.split("|") if a.strip())
        for name, answers in pairs
    }


def lines(block: str) -> tuple[str, ...]:
    """One text a line."""
    return tuple(line.strip() for line in block.strip().splitlines())


def words(block: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(word.strip() for word in " ".join(block.split()).split(",") if word.strip())


CAPITALS = facts("""
    France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Greece: Athens;
    Austria: Vienna; Poland: Warsaw; Hungary: Budapest; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki;
    Denmark: Copenhagen; Iceland: Reykjavik; Ireland: Dublin; Scotland: Edinburgh; England: London;
    Wales: Cardiff; Belgium: Brussels; the Netherlands: Amsterdam; Switzerland: Bern|Berne; Russia: Moscow;
    Ukraine: Kiev|Kyiv; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia: Belgrade;
    Slovenia: Ljubljana; Slovakia: Bratislava; Albania: Tirana; Estonia: Tallinn; Latvia: Riga;
    Lithuania: Vilnius; Malta: Valletta; Cyprus: Nicosia; Turkey: Ankara; Israel: Jerusalem; Lebanon: Beirut;
    Syria: Damascus; Jordan: Amman; Iraq: Baghdad; Iran: Tehran; Kuwait: Kuwait City; Saudi Arabia: Riyadh;
    Qatar: Doha; Oman: Muscat; Yemen: Sanaa; Egypt: Cairo; Libya: Tripoli; Tunisia: Tunis; Algeria: Algiers;
    Morocco: Rabat; Sudan: Khartoum; Ethiopia: Addis Ababa; Kenya: Nairobi; Uganda: Kampala; Rwanda: Kigali;
    Somalia: Mogadishu; Ghana: Accra; Nigeria: Abuja; Senegal: Dakar; Mali: Bamako; Angola: Luanda;
    Zambia: Lusaka; Zimbabwe: Harare; Namibia: Windhoek; Botswana: Gaborone; Mozambique: Maputo;
    Madagascar: Antananarivo; China: Beijing; Japan: Tokyo; South Korea: Seoul; North Korea: Pyongyang;
    Mongolia: Ulaanbaatar|Ulan Bator; India: New Delhi|Delhi; Pakistan: Islamabad; Nepal: Kathmandu;
    Bangladesh: Dhaka; Sri Lanka: Colombo; Thailand: Bangkok; Vietnam: Hanoi; Laos: Vientiane;
    Cambodia: Phnom Penh; Malaysia: Kuala Lumpur; Indonesia: Jakarta; the Philippines: Manila;
    Singapore: Singapore; Taiwan: Taipei; Afghanistan: Kabul; Australia: Canberra; New Zealand: Wellington;
    Fiji: Suva; Canada: Ottawa; Mexico: Mexico City; Cuba: Havana; Jamaica: Kingston; Haiti: Port au Prince;
    Panama: Panama City; Costa Rica: San Jose; Guatemala: Guatemala City; Brazil: Brasilia;
    Argentina: Buenos Aires; Chile: Santiago; Peru: Lima; Colombia: Bogota; Venezuela: Caracas;
    Ecuador: Quito; Bolivia: Sucre|La Paz; Uruguay: Montevideo; Paraguay: Asuncion;
    the United States: Washington
""")
LANGUAGES = facts("""
    France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese; Greece: Greek;
    Poland: Polish; Hungary: Hungarian; Norway: Norwegian; Sweden: Swedish; Finland: Finnish; Denmark: Danish;
    Russia: Russian; Turkey: Turkish; Egypt: Arabic; China: Chinese|Mandarin; Japan: Japanese;
    Vietnam: Vietnamese; Thailand: Thai; Brazil: Portuguese; Mexico: Spanish; Argentina: Spanish;
    Cuba: Spanish; Australia: English; Austria: German; Morocco: Arabic; Iceland: Icelandic;
    Ukraine: Ukrainian; Iran: Persian|Farsi; Israel: Hebrew
""")
CONTINENTS = facts("""
    France: Europe; Germany: Europe; Norway: Europe; Italy: Europe; Poland: Europe; China: Asia; Japan: Asia;
    India: Asia; Nepal: Asia; Thailand: Asia; Vietnam: Asia; Egypt: Africa; Kenya: Africa; Nigeria: Africa;
    Ghana: Africa; Morocco: Africa; Brazil: South America; Peru: South America; Chile: South America;
    Argentina: South America; Canada: North America; Mexico: North America; Colombia: South America;
    Ethiopia: Africa; Mongolia: Asia
""")
COLOURS = facts("""
    the sky on a clear day: blue; grass: green; a ripe banana: yellow; snow: white; coal: black; blood: red;
    a lemon: yellow; an orange: orange; a ripe tomato: red; a carrot: orange; milk: white; chocolate: brown;
    a fire engine: red; the sea: blue; a cucumber: green; a raven: black; a polar bear: white;
    a flamingo: pink; the sun: yellow|white; a strawberry: red; an emerald: green; a ruby: red;
    a sapphire: blue; a frog: green; a pumpkin: orange; salt: white; a lime: green; lettuce: green;
    an eggplant: purple; a cherry: red; sand: yellow|brown|tan; a crow: black; gold: yellow|gold;
    spinach: green; a swan: white; ketchup: red; a pea: green; a cloud: white|gray|grey; a stop sign: red;
    a sunflower: yellow; coffee: brown|black
""")
OPPOSITES = facts("""
    hot: cold; big: small|little; up: down; left: right; day: night; black: white; fast: slow;
    happy: sad|unhappy; old: young|new; open: closed|shut|close; early: late; full: empty; high: low;
    long: short; rich: poor; hard: soft|easy; light: dark|heavy; strong: weak; tall: short; thick: thin;
    wet: dry; wide: narrow; clean: dirty; deep: shallow; easy: difficult|hard; good: bad; loud: quiet|soft;
    near: far; noisy: quiet|silent; push: pull; quick: slow; rough: smooth; safe: dangerous|unsafe;
    sharp: dull|blunt; sweet: sour|bitter; true: false; warm: cool|cold; win: lose; love: hate; friend: enemy;
    inside: outside; first: last; always: never; begin: end|finish; buy: sell; come: go; laugh: cry;
    north: south; east: west; summer: winter; above: below|under; alive: dead; ancient: modern; asleep: awake;
    before: after; brave: cowardly|afraid; cheap: expensive; give: take|receive; heavy: light;
    remember: forget; same: different; top: bottom; war: peace; success: failure
""")
YOUNG = facts("""
    dog: puppy|pup; cat: kitten; cow: calf; horse: foal; sheep: lamb; pig: piglet; goat: kid; lion: cub;
    bear: cub; duck: duckling; hen: chick; goose: gosling; deer: fawn; kangaroo: joey; frog: tadpole;
    fox: cub|kit; wolf: pup|cub; swan: cygnet; seal: pup; elephant: calf; owl: owlet; whale: calf; tiger: cub;
    rabbit: kit|kitten|bunny; eagle: eaglet|chick
""")
SOUNDS = facts("""
    dog: bark|woof; cat: meow|purr; cow: moo; duck: quack; sheep: baa|bleat; pig: oink|grunt;
    horse: neigh|whinny; lion: roar; wolf: howl; frog: croak|ribbit; bee: buzz; snake: hiss; owl: hoot;
    mouse: squeak; donkey: bray; hen: cluck; crow: caw
""")
LEGS = facts("""
    dog: four; cat: four; spider: eight; ant: six; bee: six; horse: four; chicken: two; cow: four;
    snake: no|zero|none; duck: two; butterfly: six; elephant: four; octopus: eight; fish: no|zero|none;
    beetle: six; lion: four; ostrich: two; mosquito: six
""")
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
AFTER = {
    a: (b.lower(),) for names in (DAYS, MONTHS) for a, b in zip(names, names[1:] + names[:1], strict=True)
}
BEFORE = {
    b: (a.lower(),) for names in (DAYS, MONTHS) for a, b in zip(names, names[1:] + names[:1], strict=True)
}
MADE_OF = facts("""
    bread: flour|wheat; cheese: milk; butter: milk|cream; wine: grapes|grape; chocolate: cocoa|cacao;
    an omelette: eggs|egg; yogurt: milk; ketchup: tomatoes|tomato; raisins: grapes|grape; tofu: soybeans|soy;
    pasta: flour|wheat; popcorn: corn; cider: apples|apple; hummus: chickpeas|chickpea;
    French fries: potatoes|potato; peanut butter: peanuts|peanut; honey: nectar|bees; sushi: rice;
    guacamole: avocado|avocados; flour: wheat|grain; chips: potatoes|potato; beer: barley|hops
""")
AUTHORS = facts("""
    Hamlet: Shakespeare; Romeo and Juliet: Shakespeare; Macbeth: Shakespeare; Oliver Twist: Dickens;
    Great Expectations: Dickens; Pride and Prejudice: Austen; Sense and Sensibility: Austen;
    Frankenstein: Shelley; Dracula: Stoker; War and Peace: Tolstoy;
    Crime and Punishment: Dostoevsky|Dostoyevsky; Don Quixote: Cervantes; The Odyssey: Homer;
    Harry Potter: Rowling; The Lord of the Rings: Tolkien; The Hobbit: Tolkien; Animal Farm: Orwell;
    Moby Dick: Melville; Tom Sawyer: Twain; Jane Eyre: Bronte; Wuthering Heights: Bronte;
    The Great Gatsby: Fitzgerald; Peter Pan: Barrie; Treasure Island: Stevenson; Alice in Wonderland: Carroll;
    The Jungle Book: Kipling; Robinson Crusoe: Defoe; The Time Machine: Wells; Faust: Goethe;
    The Divine Comedy: Dante; Les Miserables: Hugo; The Little Prince: Saint Exupery; The Raven: Poe;
    The Old Man and the Sea: Hemingway
""")
PAINTERS = facts("""
    the Mona Lisa: da Vinci|Leonardo; the Last Supper: da Vinci|Leonardo; the Starry Night: van Gogh;
    the Sunflowers: van Gogh; Guernica: Picasso; the Scream: Munch; the Night Watch: Rembrandt;
    the Birth of Venus: Botticelli; the Water Lilies: Monet; the Kiss: Klimt;
    the Sistine Chapel: Michelangelo; the Persistence of Memory: Dali; Girl with a Pearl Earring: Vermeer;
    American Gothic: Wood; the Great Wave: Hokusai; the School of Athens: Raphael; the Milkmaid: Vermeer;
    Nighthawks: Hopper
""")
NAMED = facts("""
    fruit: apple|banana|orange|grape|pear|mango|strawberry|peach|cherry;
    vegetable: carrot|potato|broccoli|onion|spinach|tomato;
    colour: red|blue|green|yellow|orange|purple|black|white;
    day of the week: monday|tuesday|wednesday|thursday|friday|saturday|sunday;
    month of the year: january|february|march|april|may|june|july|august|september|october|november|december;
    season: spring|summer|autumn|fall|winter; planet: mercury|venus|earth|mars|jupiter|saturn|uranus|neptune;
    wild animal: lion|tiger|elephant|bear|wolf|leopard|giraffe|zebra;
    farm animal: cow|pig|sheep|goat|horse|chicken|hen;
    musical instrument: piano|guitar|violin|flute|drum|drums|trumpet|cello;
    metal: iron|gold|silver|copper|steel|aluminum; ocean: pacific|atlantic|indian|arctic;
    continent: africa|asia|europe|america|australia|antarctica;
    sport: football|soccer|tennis|basketball|baseball|hockey|golf|swimming;
    shape: circle|square|triangle|rectangle; bird: eagle|robin|sparrow|owl|parrot|crow|hawk|falcon;
    insect: ant|bee|butterfly|fly|beetle|mosquito|bug; flower: rose|tulip|daisy|lily|sunflower|orchid;
    tree: oak|pine|maple|birch|willow|elm|tree; fish: salmon|tuna|trout|cod|bass|shark;
    drink: water|tea|coffee|juice|milk|soda|wine|lemonade;
    language: english|french|spanish|german|chinese|italian; river in Europe: danube|rhine|thames|seine|volga;
    big city: new york|london|tokyo|paris|chicago; part of the body: hand|foot|head|arm|leg|heart
""")
THINGS = facts("""
    a doctor:; a hammer:; a library:; a volcano:; a dictionary:; a mountain:; a river:; a desert:; an island:;
    a baker:; a teacher:; a telescope:; a compass:; an umbrella:; a bridge:; a museum:; a hospital:;
    a farmer:; a pilot:; a magnet:; a rainbow:; a thermometer:; a vegetable:; a mammal:; a planet:; a robot:;
    a camera:; a battery:; an engine:; a forest:; gravity:; electricity:; photosynthesis:; oxygen:; a poem:;
    a novel:; an orchestra:; a passport:; a calendar:; a keyboard:; a candle:; an airport:; an earthquake:;
    a glacier:; a waterfall:; a lawyer:; an architect:; a microscope:; a virus:; a whale:
""")

TOPICS = {
    "capital": Topic(
        CAPITALS,
        lines("""
            What is the capital of {x}?
            What is the capital city of {x}?
            Can you name the capital city of {x}?
            Can you tell me the capital of {x}?
            Please tell me the capital city of {x}.
            Do you know the capital of {x}?
            Name the capital of {x}.
            The capital of {x} is called what?
            Which city is the seat of government of {x}?
            I would like to know the capital of {x}."""),
        lines("""
            Could you tell me what the capital city of {x} is called?
            What is the name of the capital of {x}?
            Tell me, what is the capital city of {x}?
            Which city is the capital of {x}?"""),
    ),
    "language": Topic(
        LANGUAGES,
        lines("""
            What language do people speak in {x}?
            Which language is spoken in {x}?
            What is the main language of {x}?
            Can you tell me what language they speak in {x}?"""),
        lines("""
            What language would I hear in {x}?
            Please tell me which language most people use in {x}."""),
    ),
    "continent": Topic(
        CONTINENTS,
        lines("""
            On which continent is {x}?
            Which continent does {x} belong to?
            What continent is {x} in?
            Can you tell me the continent of {x}?"""),
        lines("""
            In which part of the world would I find {x}, what continent?
            Tell me the name of the continent where {x} lies."""),
    ),
    "colour": Topic(
        COLOURS,
        lines("""
            What colour is {x}?
            What is the colour of {x}?
            Can you tell me the colour of {x}?
            Please tell me what colour {x} is.
            Do you know what colour {x} is?
            Which colour does {x} have?
            Tell me the usual colour of {x}."""),
        lines("""
            What colour would you say {x} is?
            What is the usual colour of {x}?
            Could you tell me which colour {x} has?"""),
    ),
    "opposite": Topic(
        OPPOSITES,
        lines("""
            What is the opposite of {x}?
            Can you tell me the opposite of {x}?
            Tell me the opposite of the word {x}.
            Which word means the opposite of {x}?
            Please give me the opposite of {x}.
            Do you know the opposite of {x}?"""),
        lines("""
            What word is the opposite of {x}?
            Could you give me a word that means the opposite of {x}?
            I need the opposite of the word {x}."""),
    ),
    "young": Topic(
        YOUNG,
        lines("""
            What is a baby {x} called?
            What do you call a young {x}?
            Can you tell me what a baby {x} is called?
            What is the name for a young {x}?"""),
        lines("""
            What do we call the baby of a {x}?
            Please tell me the word for a young {x}."""),
    ),
    "sound": Topic(
        SOUNDS,
        lines("""
            What sound does a {x} make?
            Which sound does a {x} make?
            Can you tell me what sound a {x} makes?
            What does a {x} say?"""),
        lines("""
            What noise does a {x} make?
            Tell me the sound that a {x} makes."""),
    ),
    "legs": Topic(
        LEGS,
        lines("""
            How many legs does a {x} have?
            Can you tell me how many legs a {x} has?
            What number of legs does a {x} have?"""),
        lines("""
            Do you know how many legs a {x} has?
            Tell me how many legs you can count on a {x}."""),
    ),
    "after": Topic(
        AFTER,
        lines("""
            What comes after {x}?
            What comes right after {x}?
            Can you tell me what follows {x}?
            Which one comes next after {x}?"""),
        lines("""
            Please tell me what comes after {x}.
            If today it is {x}, what comes next?"""),
    ),
    "before": Topic(
        BEFORE,
        lines("""
            What comes before {x}?
            What comes right before {x}?
            Can you tell me what comes just before {x}?"""),
        lines("""
            Please tell me what comes before {x}.
            Which one is just ahead of {x}?"""),
    ),
    "food": Topic(
        MADE_OF,
        lines("""
            What is {x} made from?
            What is the main ingredient of {x}?
            What do you need to make {x}?
            Can you tell me what {x} is made of?
            What goes into {x}?"""),
        lines("""
            What do people make {x} from?
            Tell me the most important ingredient of {x}."""),
    ),
    "author": Topic(
        AUTHORS,
        lines("""
            Who wrote {x}?
            Who is the author of {x}?
            Can you tell me who wrote {x}?
            Which writer gave us {x}?
            Do you know who wrote {x}?
            Name the author of {x}."""),
        lines("""
            Who was the writer of {x}?
            Please tell me the author of {x}."""),
    ),
    "painter": Topic(
        PAINTERS,
        lines("""
            Who painted {x}?
            Can you tell me who painted {x}?
            Which artist painted {x}?
            Who is the painter of {x}?"""),
        lines("""
            Who was the artist behind {x}?
            Do you know which painter made {x}?"""),
    ),
    "name": Topic(
        NAMED,
        lines("""
            Name a {x}.
            Can you name a {x}?
            Please name one {x}.
            Give me an example of a {x}.
            Tell me the name of a {x}."""),
        lines("""
            Could you give me one example of a {x}?
            Think of a {x} and tell me its name."""),
    ),
    "definition": Topic(
        THINGS,
        lines("""
            What is {x}?
            Can you explain what {x} is?
            Tell me what {x} is.
            How would you describe {x}?
            What does it mean when people say {x}?"""),
        lines("""
            Could you explain to me what {x} is?
            In one sentence, what is {x}?"""),
    ),
}  # fmt: skip

FIRST_NAMES = words("""
    Anna, Peter, Maria, Thomas, Emma, David, Laura, Simon, Julia, Martin, Sarah, Daniel, Helen, Robert, Alice,
    George, Nina, Oscar, Clara, Henry, Lucy, Frank, Sophie, Victor, Grace, Walter, Emily, Jacob, Rosa, Philip,
    Ellen, Andrew, Carol, Leo, Diana, Edward, Fiona, Gregory, Hannah, Isaac, Jenny, Kevin, Linda, Michael,
    Nancy, Oliver, Paula, Richard, Susan, Tina
""")
COUNTRIES = tuple(CAPITALS)
CAPITAL_CITIES = tuple(dict.fromkeys(city.title() for cities in CAPITALS.values() for city in cities))
CITIES = CAPITAL_CITIES + words("""
    New York, Chicago, Boston, Sydney, Melbourne, Toronto, Venice, Florence, Barcelona, Hamburg, Munich,
    Geneva, Zurich, Milan, Naples, Liverpool, Manchester, Glasgow, Oxford, Cambridge, Shanghai, Hong Kong,
    Mumbai, Istanbul, San Francisco, Seattle
""")
PROPER = (
    "capital",
    "language",
    "continent",
    "after",
    "before",
    "author",
    "painter",
)  # topics answered by a name
WORDS: dict[str, tuple[str, ...]] = {
    "name": FIRST_NAMES,
    "country": COUNTRIES,
    "city": CITIES,
    "day": DAYS,
    "month": MONTHS,
    "work": tuple(AUTHORS),
    "person": words("""
        my sister, my brother, our neighbour, the teacher, the old doctor, my best friend, the young farmer,
        her uncle, his aunt, the baker, a tall policeman, the new student, their grandmother, the captain,
        the nurse, a little girl, the driver, our cousin, the painter, the lawyer, a famous writer,
        the gardener, my grandfather, the postman, the pilot, a stranger
    """),
    "people": words("""
        the children, my parents, our friends, the students, two tourists, the workers, many people,
        the players, our guests, the musicians, some visitors, the farmers, the twins, most families,
        the soldiers, a few engineers
    """),
    "object": words("""
        book, lamp, chair, table, window, bicycle, letter, picture, camera, bottle, basket, blanket, mirror,
        ladder, hammer, pencil, suitcase, umbrella, wallet, clock, kettle, carpet, guitar, violin, ticket,
        newspaper, candle, cushion, notebook, telephone, computer, wheel, bucket, shovel, jacket, sweater,
        hat, scarf, pair of shoes, key, map, box, cup, plate, spoon
    """),
    "adjective": words("""
        old, new, small, large, heavy, broken, wooden, beautiful, expensive, cheap, strange, round, golden,
        dirty, clean, soft, bright, dark, tiny, useful, empty, narrow, modern, ancient, colourful, plain,
        sharp, simple, warm, cold, quiet, famous
    """),
    "colour": words("red, blue, green, yellow, brown, black, white, orange, purple, pink, grey, silver"),
    "animal": words("""
        dog, cat, horse, cow, sheep, goat, rabbit, fox, wolf, bear, lion, tiger, elephant, monkey, squirrel,
        mouse, eagle, owl, swan, duck, goose, parrot, snake, frog, turtle, dolphin, whale, deer, donkey,
        camel, giraffe, zebra, penguin, spider
    """),
    "food": words("""
        bread, cheese, soup, rice, fish, chicken, salad, pasta, potatoes, beans, eggs, pancakes, apples,
        oranges, grapes, cherries, chocolate, honey, butter, yogurt, mushrooms, tomatoes, carrots, onions,
        peaches, strawberries, ice cream, apple pie, toast
    """),
    "place": words("""
        in the garden, at the station, near the river, behind the house, in the kitchen, at the market,
        on the beach, in the forest, across the street, at school, under the bridge, on the hill,
        in the museum, at the airport, in the library, by the lake, in the mountains, next to the church,
        at the theatre, on the train, in the office, outside the hospital, in the village
    """),
    "time": words("""
        yesterday, this morning, last night, every day, last week, on Sunday, in the evening, at noon,
        two days ago, last summer, after dinner, before breakfast, in the afternoon, a year ago, at midnight,
        during the winter, once a month, last Friday
    """),
    "weather": words(
        "sunny, rainy, windy, cloudy, foggy, stormy, snowy, dry, humid, freezing, warm, unusually hot, mild"
    ),
    "number": words("""
        two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
        sixteen, seventeen, eighteen, nineteen, twenty, twenty four, thirty, thirty five, forty, forty two,
        fifty, sixty, seventy, eighty, ninety
    """),
    "past": words("""
        bought, found, lost, painted, repaired, sold, broke, carried, cleaned, dropped, borrowed, forgot, hid,
        noticed, opened, packed, wanted, kept, washed, wrapped, moved, watched, returned, described,
        photographed, remembered, ordered
    """),
    "feeling": words(
        "happy, tired, angry, nervous, proud, hungry, bored, surprised, worried, excited, lonely, calm"
    ),
    "doing": words("""
        reading a book, playing the piano, cooking dinner, waiting for the bus, writing a letter,
        looking for the keys, walking the dog, learning a new song, drinking coffee, cleaning the windows,
        feeding the birds, fixing the roof, watching the rain, planting flowers, talking on the phone,
        counting the money, packing a suitcase, drawing a map
    """),
    # what questions are about, held-out entities too: the word is met here, the question never
    "entity": tuple(dict.fromkeys(entity for topic in TOPICS.values() for entity in topic.facts)),
    # what answers consist of, held-out ones too: the word is met here, the answer never
    "answer": tuple(
        dict.fromkeys(
            answer.title() if name in PROPER else answer
            for name, topic in TOPICS.items()
            for accepted in topic.facts.values()
            for answer in accepted
        )
    ),
    "reason": words("""
        because it was late, because the bus was full, because nobody was home, because the shop had closed,
        although it was raining, while the music was playing, before the sun came up,
        as soon as the door opened, since everyone was hungry, in spite of the noise
    """),
}

# Test templates share no wording with the training ones; words may be shared.
SENTENCES = {
    "train": lines("""
        {Person} {past} the {adjective} {object} {place}.
        {Person} {past} a {colour} {object} {time}.
        {People} were {doing} {place} {time}.
        {Name} was {doing} {reason}.
        {Name} and {name} travelled from {city} to {city} in {month}.
        We visited {country} and {country} {time}.
        {Name} moved to {city} {number} years ago.
        The train to {city} leaves at {number} on {day}.
        It was {weather} in {city} {time}.
        {Person} ate {food} and {food} {time}.
        A {adjective} {animal} was sleeping {place}.
        There were {number} {colour} boxes {place}.
        {Name} gave the {object} to {person} on {day}.
        {Person} felt {feeling} {reason}.
        The {animal} and the {animal} live {place}.
        My friend {name} comes from {country}.
        I have never been to {country}, but I know {city} well.
        The {colour} {object} costs {number} dollars.
        {Name} is reading {work} {place}.
        {People} {past} {number} {adjective} boxes {time}, {reason}.
        She likes {food}, but she does not like {food}.
        In {month} the weather in {country} is often {weather}.
        He put the {object} and the {adjective} {object} {place}.
        {Person} works {place} from {day} to {day}.
        {Name} told me about {entity} and {entity}.
        {Person} wrote {entity} and {entity} on a sheet of paper {time}.
        My brother said {entity}, not {entity}.
        {People} spoke about {entity} {place}.
        I had to spell {entity}, {entity} and {entity} at school.
        The story of {entity} makes {name} {feeling}.
        {Name} was thinking about {entity} {reason}."""),
    "test": lines("""
        Have you seen the {colour} {object} that {name} left {place}?
        Nobody knew why {person} looked so {feeling} that {day}.
        When {name} arrived in {city}, everybody was {doing}.
        Our plane from {country} was {number} minutes late.
        If it is {weather} on {day}, we will stay {place}.
        They sold us {number} kilos of {food} for the party.
        What a {adjective} {animal} that was, said {name}.
        The road between {city} and {city} is closed until {month}.
        {Name} forgot that {person} had never tried {food}.
        Far away from {country}, {people} still speak about {work}."""),
}  # fmt: skip

# Numbers as they are written; text.clean_for_speech says them. For SPOKEN only: all other texts are spelled out.
NUMERALS: dict[str, tuple[str, ...]] = {
    "count": (*map(str, range(101)), *map(str, range(110, 1000, 10)), *(f"{n},000" for n in range(1, 100))),
    "year": tuple(map(str, range(1400, 2031))),
    "ordinal": words("""
        1st, 2nd, 3rd, 4th, 5th, 6th, 7th, 8th, 9th, 10th, 11th, 12th, 13th, 14th, 15th, 16th, 17th, 18th, 19th,
        20th, 21st, 22nd, 23rd, 24th, 25th, 26th, 27th, 28th, 29th, 30th, 31st
    """),
    "percent": tuple(f"{n}%" for n in range(1, 101)),
    "money": (
        *(f"${n}" for n in range(2, 100)),
        *(f"${n}.{c}" for n in range(1, 20) for c in (25, 50, 75, 99)),
    ),
    "clock": tuple(f"{hour}:{minute:02d}" for hour in range(1, 13) for minute in range(0, 60, 5)),
    "measure": tuple(
        f"{n} {unit}"
        for n in (2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 250)
        for unit in ("km", "kg", "°C", "mph", "cm", "GB", "m")
    ),
    "decimal": tuple(f"{n}.{d}" for n in range(0, 20) for d in range(1, 10)),
}

# In the manner of answers, with numbers, names and facts: for a voice that answers questions. Splits as above.
SPOKEN = {
    "train": lines("""
        It is {answer}, not {answer}.
        The word that you look for is {answer}.
        Most people would say {answer} or {answer}.
        {Answer} is one example, {answer} is another.
        Yes, {entity} has something to do with {answer}.
        No, {entity} is not the same as {entity}.
        {City} is a large city in the north of {country}.
        In {country}, people know {city} for its {food}.
        {Entity} is often mentioned together with {answer}.
        The answer depends on {entity}, {name}.
        There are {count} of them, or perhaps {count}.
        In {year}, about {count} people lived there.
        It was built in {year} and opened in {month} {year}.
        The price rose by {percent} to {money}.
        Only {percent} of the visitors came from {country}.
        It costs {money}, which is {decimal} times as much.
        We meet on {day}, the {ordinal}, at {clock}.
        The {ordinal} of {month} is a {day}.
        It is {measure} from here, or {count} steps.
        The {animal} weighs {measure} and runs at {measure}.
        It took {decimal} hours to walk {measure}.
        {Name} was born on the {ordinal} of {month}, {year}."""),
    "test": lines("""
        I believe that it was {answer} in {year}.
        You can find {answer} near {city}.
        About {percent} of all answers were {answer}.
        The {animal} is {measure} long and {count} years old.
        {Name} paid {money} for {food} at {clock}.
        On the {ordinal} of {month} it was {decimal} degrees in {city}."""),
}  # fmt: skip

NOT_ADDRESSED = {
    "train": lines("""
        {Name}, could you close the window, please?
        Hey {name}, where did you put the {object}?
        {Name}, dinner is ready.
        I told {name} that we would meet {place}.
        Come here, {name}, and bring the {object}.
        {Name}, do you want some {food}?
        Mum, have you seen my {object}?
        No, {name}, not now, I am on the phone.
        Good morning, {name}, did you sleep well?
        {Name}, what time does your train leave?"""),
    "test": lines("""
        Listen, {name}, we need to leave {place} soon.
        {Name}, can you hold the {object} for a moment?
        Dad, {name} took my {object} again.
        I am talking to {name}, just a second.
        {Name}, is there any {food} left?"""),
}  # fmt: skip
BACK_CHANNELS = {
    "train": words("mhm, uh huh, right, okay, I see, yeah, sure, oh really, ah okay, yes yes, got it, hmm"),
    "test": words("mm hmm, all right, I understand, oh yes, indeed, aha"),
}
HESITATIONS = {"train": words("um, uh, well, let me see, er"), "test": words("erm, let me think, hmm")}


def stream(seed: int, split: str, purpose: str) -> random.Random:
    """A generator of its own for every purpose, so that adding one never shifts another."""
    if split not in ("train", "test"):
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")
    return random.Random(f"{purpose}/{split}/{seed}")


def entities(topic: str, split: str) -> tuple[str, ...]:
    """The entities of a topic in one split: every fourth, in an order that no seed changes, is for testing.

    A country that is held out under one topic is held out under all.
    """
    held_out = {name for block in (CAPITALS, AFTER) for name in tuple(block)[3::4]}
    known = set(CAPITALS) | set(AFTER)
    own = [name for name in TOPICS[topic].facts if name not in known]
    held_out |= set(own[3::4])
    return tuple(name for name in TOPICS[topic].facts if (name in held_out) == (split == "test"))


def with_articles(text: str) -> str:
    """ "a apple" -> "an apple", but "a useful ..." stays."""
    return re.sub(r"\b([Aa]) (?=[aeio]|u(?!s))", r"\1n ", text)


def all_questions(split: str) -> list[Question]:
    """Every question of a split, in a fixed order."""
    found = []
    for name, topic in TOPICS.items():
        for wording in topic.train if split == "train" else topic.test:
            cut = len(wording.split("{x}")[0].split())
            for entity in entities(name, split):
                text = with_articles(wording.replace("{x}", entity))
                found.append(Question(text, name, entity, topic.facts[entity], cut))
    return found


def questions(count: int, seed: int, split: str = "train") -> list[Question]:
    """`count` questions, topics in equal parts as far as they last; repeats after all have been asked."""
    generator = stream(seed, split, "questions")
    by_topic: dict[str, list[Question]] = {}
    for question in all_questions(split):
        by_topic.setdefault(question.topic, []).append(question)
    for group in by_topic.values():
        generator.shuffle(group)
    # Deal one of each topic in turn, like cards, so that a small set still covers every topic.
    deck = [
        group[turn]
        for turn in range(max(map(len, by_topic.values())))
        for group in by_topic.values()
        if turn < len(group)
    ]
    return [deck[index % len(deck)] for index in range(count)]


def fill(template: str, generator: random.Random) -> str:
    """Put a random word into every {slot}; a capitalised slot starts a sentence."""

    def choose(match: re.Match) -> str:
        slot = match.group(1)
        word = generator.choice(NUMERALS.get(slot.lower()) or WORDS[slot.lower()])
        return word[0].upper() + word[1:] if slot[0].isupper() else word

    return with_articles(re.sub(r"\{(\w+)\}", choose, template))


def distinct(count: int, make: Callable[[], str]) -> Iterator[str]:
    """`count` texts out of `make`, without repeats for as long as new ones turn up."""
    seen: set[str] = set()
    for _ in range(count):
        for _ in range(20):
            text = make()
            if text not in seen:
                break
        seen.add(text)
        yield text


def sentences(count: int, seed: int, split: str = "train") -> list[str]:
    """`count` free sentences of at most 20 words."""
    generator = stream(seed, split, "sentences")
    return list(distinct(count, lambda: fill(generator.choice(SENTENCES[split]), generator)))


def spoken_sentences(count: int, seed: int, split: str = "train") -> list[str]:
    """`count` sentences with the numbers and names that answers consist of; numbers in digits, as they are written."""
    generator = stream(seed, split, "spoken sentences")
    return list(distinct(count, lambda: fill(generator.choice(SPOKEN[split]), generator)))


def patchwork(count: int, written: Sequence[str], seed: int, split: str = "train") -> list[str]:
    """`count` texts of 5 to 12 words that make no sense: fragments of written sentences, often around a word of ours.

    A recogniser that has only met templates learns them by heart and guesses; here there is nothing to guess, and each
    name stands among words that it never stands among twice.
    """
    generator = stream(seed, split, "patchwork")
    kinds = sorted(kind for kind in WORDS if kind not in ("place", "doing", "reason"))

    def fragment() -> list[str]:
        parts = generator.choice(written).rstrip(".!?").split()
        size = min(len(parts), generator.randint(2, 6))
        begin = generator.randint(0, len(parts) - size)
        return parts[begin : begin + size]

    def make() -> str:
        middle = [generator.choice(WORDS[generator.choice(kinds)])] if generator.random() < 0.6 else []
        text = " ".join([*fragment(), *middle, *fragment()])
        return f"{text[0].upper()}{text[1:]}."

    return list(distinct(count, make))


def not_addressed(count: int, seed: int, split: str = "train") -> list[str]:
    """Talk to another, named person: the system must not answer it."""
    generator = stream(seed, split, "not addressed")
    return list(distinct(count, lambda: fill(generator.choice(NOT_ADDRESSED[split]), generator)))


def back_channels(count: int, seed: int, split: str = "train") -> list[str]:
    """Short signs of listening; there are few, so they repeat."""
    generator = stream(seed, split, "back-channels")
    return [generator.choice(BACK_CHANNELS[split]) for _ in range(count)]


def cut_in_two(question: Question) -> tuple[str, str]:
    """A question as its incomplete beginning and its rest, which is empty if the entity comes first."""
    parts = question.text.split()
    return (
        (" ".join(parts[: question.cut]), " ".join(parts[question.cut :]))
        if question.cut
        else (question.text, "")
    )


def can_break_off(question: Question) -> bool:
    """Whether its beginning is long enough to be heard as an unfinished question."""
    return question.cut >= 3


def unfinished(count: int, seed: int, split: str = "train") -> list[str]:
    """Questions broken off before what they are about: "Can you tell me the capital of"."""
    generator = stream(seed, split, "unfinished")
    pool = [cut_in_two(question)[0] for question in all_questions(split) if can_break_off(question)]
    return [generator.choice(pool) for _ in range(count)]


def hesitant(question: Question, seed: int, split: str = "train") -> tuple[str, str]:
    """The two parts of a question with a hesitation between them, or with a self-correction of its entity."""
    generator = stream(seed, split, f"hesitation {question.text}")
    before, after = cut_in_two(question)
    if not after:
        return before, after
    others = [name for name in entities(question.topic, split) if name != question.entity]
    if others and generator.random() < 0.3:
        return f"{before} {generator.choice(others)},", f"no, I mean {after}"
    return f"{before}, {generator.choice(HESITATIONS[split])},", after
