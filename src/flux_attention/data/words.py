"""Word lists for keys, values and rows, kept short enough to be common tokens."""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    acorn actor album alley amber anchor angle ankle apple apron arena arrow artist aspect atlas attic author
    autumn bakery ballet bamboo banjo barley barrel basket beacon beaver berry bishop blanket blossom border
    bottle boulder branch brick bridge bronze brush bucket butter button cabin cactus camera canal candle canoe
    canvas canyon carbon carpet carrot castle cattle cedar cement center cherry chicken chimney circle circus
    citizen clay cliff clock cloud clover coast cobra coffee collar comet copper coral corner cotton cradle
    crater cricket crown crystal curtain cushion dagger daisy dancer desert diamond dinner doctor dollar dolphin
    donkey dragon drawer driver eagle earth echo editor elbow emerald engine ember fabric falcon farmer feather
    fence ferry fiddle finger flame flute forest fossil fountain fox frame freight galaxy garden garlic ginger
    glacier glove goblet gospel granite grape gravel guitar hammer harbor harvest hazel helmet herald hill
    hockey honey horizon hotel hunter iceberg insect island ivory jacket jaguar jasmine jelly jewel jungle
    kettle kidney kitchen kitten ladder lagoon lantern laser leather lemon leopard letter lily lion lizard
    lobster locket lumber magnet mango maple marble market meadow medal melody merchant meteor mirror monkey
    mosaic motor mountain museum mustard napkin needle nephew nickel notebook nugget oasis ocean office olive
    onion opera orange orchard orchid otter oven oyster paddle palace panda paper parade parrot pasture peach
    pearl pebble pencil pepper piano pigeon pillow pilot pirate planet plaza pocket poem poet pony potato
    prairie prince pumpkin puppet puzzle quartz quilt rabbit racket radar radio raven record reef ribbon rice
    rifle river robin rocket rooster rose saddle sailor salmon sapphire saturn sculptor season shadow shelter
    shepherd shield shovel signal silver singer slipper smoke soldier spider spoon spring statue stone storm
    stove straw summit sunset swan sweater table tailor temple theater thunder ticket tiger timber tower tractor
    trail trumpet tulip tunnel turtle umbrella valley vapor velvet vessel village violin volcano wagon wallet
    walnut water whale wheat whistle willow window winter wolf yard zebra
    """
)

ADJECTIVES = _words(
    """
    able ancient angry bald basic bitter blank blue bold brave brief bright broad brown calm careful cheap clean
    clear clever cold common cool crisp cruel curious damp dark deep dense dirty distant double dry dull eager
    early easy elegant empty equal exact faint fair famous fancy fast fierce final fine firm flat fresh full
    gentle giant glad golden grand gray great green happy hard heavy hollow honest huge humble hungry icy idle
    jolly keen kind large late lazy light little lively local lonely long loose loud lucky mellow mild modern
    narrow neat noble noisy odd old open pale patient plain polite poor proud purple quick quiet rapid rare
    ready red rich ripe rough round royal rude rural sad safe salty sharp shiny short shy silent simple slim
    slow small smooth sober soft solid sour square steady steep stiff strange strict strong sunny sweet swift
    tall tame tender thick thin tidy tiny tired tough urban vast vivid warm weak wet white wide wild wise witty
    young
    """
)

NAMES = _words(
    """
    Ada Albert Alice Amir Anna Boris Carla Carlos Clara Daniel Diana Elena Emil Emma Farid Fiona Frank Grace
    Greta Hana Hugo Ida Igor Irene Ivan Jack Jane Jonas Julia Karl Kenji Laura Leo Lily Lucas Maria Marta Maya
    Mina Nadia Nina Noah Olga Omar Oscar Paul Petra Quentin Rosa Ruth Samir Sara Simon Sofia Tara Thomas Vera
    Victor Wendy Yusuf
    """
)

SURNAMES = _words(
    """
    Adams Baker Brown Carter Clark Cooper Dixon Ellis Evans Fisher Foster Fuller Grant Gray Green Hall Harris
    Hill Hughes Hunter Jones Kelly King Knight Lane Lee Lewis Marsh Mason Miller Moore Morgan Murphy Nash Palmer
    Parker Perry Porter Price Reed Rice Rose Scott Shaw Stone Taylor Turner Walker Ward Webb West White Wood
    Young
    """
)

CITIES = _words(
    """
    Athens Berlin Boston Cairo Chicago Dallas Denver Dublin Geneva Havana Houston Kyoto Lagos Lima Lisbon London
    Madrid Miami Milan Moscow Mumbai Nairobi Oslo Paris Prague Rome Seattle Seoul Sydney Tokyo Toronto Vienna
    Warsaw Zurich
    """
)

JOBS = _words(
    """
    actor architect baker banker barber carpenter chef chemist dentist designer doctor driver editor engineer
    farmer fisherman gardener geologist hunter journalist judge lawyer librarian mechanic musician nurse painter
    pharmacist photographer pilot plumber poet potter sailor sculptor singer tailor teacher translator waiter
    """
)


def person(rng: random.Random) -> str:
    """A first and a last name."""
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def thing(rng: random.Random) -> str:
    """`adjective noun`."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def keys(rng: random.Random, count: int) -> list[str]:
    """Distinct `adjective-noun` keys."""
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[pair % len(ADJECTIVES)]}-{NOUNS[pair // len(ADJECTIVES)]}" for pair in pairs]


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Distinct numbers of `digits` digits."""
    return [str(value) for value in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    """Values in the form of a UUID, drawn from `rng`."""
    values = []
    for _ in range(count):
        text = f"{rng.getrandbits(128):032x}"
        values.append("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))
    return values
