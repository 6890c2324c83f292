"""Write the demo's questions, which are topics in templates, to three files: to train on, to tune settings on, and to
measure on. No topic is in two files.

Usage: python recipes/demo/prompts.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TUNING_TOPICS = 128
"""Number of topics on which the settings of the recipe were chosen. Nothing trains on them."""
MEASURED_TOPICS = 256
"""Number of topics on which the reported figures are measured. Nothing trains on them, or was chosen by them."""
SPLIT_SEED = 20261201


class Theme(NamedTuple):
    """Topics that fit into the same questions.

    Attributes:
        templates: the questions, separated by `|`, with `{}` for the topic.
        topics: the topics, separated by commas.
    """

    templates: str
    topics: str


THEMES = (
    Theme(
        "How do I grow {}?|When is the right time to plant {}?|Why do my {} keep dying?|Are {} easy to keep in "
        "pots on a balcony?",
        "tomatoes, roses, strawberries, sunflowers, tulips, carrots, potatoes, onions, peppers, cucumbers, "
        "pumpkins, beans, peas, radishes, lavender, orchids, cactuses, ferns, lilies, daffodils, daisies, "
        "marigolds, geraniums, violets, begonias, hydrangeas, azaleas, camellias, peonies, irises, poppies, "
        "zucchini, eggplants, beets, leeks, cabbages, cauliflowers, turnips, chives, mint plants, basil plants, "
        "parsley plants, rosemary bushes, blueberries, raspberries, blackberries, gooseberries, grapes, figs, "
        "lemon trees, apple trees, cherry trees, olive trees, avocados, melons, artichokes, asparagus, rhubarb, "
        "spinach plants, lettuces",
    ),
    Theme(
        "How do I cook {}?|What goes well with {}?|How long can I keep {} in the fridge?|Is it healthy to eat {} "
        "every day?",
        "rice, lentils, salmon, chicken breast, mushrooms, broccoli, quinoa, oatmeal, pancakes, scrambled eggs, "
        "pasta, couscous, chickpeas, tofu, shrimp, tuna steaks, roast beef, pork chops, lamb stew, turkey, sweet "
        "potatoes, corn on the cob, green beans, kale, Brussels sprouts, omelettes, risotto, tomato soup, chili, "
        "meatballs, lasagna, pizza dough, cornbread, banana bread, cheesecake, apple pie, brownies, waffles, "
        "French toast, hummus, guacamole, coleslaw, potato salad, fried rice, ramen, sushi, tacos, burritos, "
        "curry, dumplings, polenta, gnocchi, mussels, crab cakes, goat cheese, bacon, sausages, gravy, porridge, "
        "yogurt",
    ),
    Theme(
        "What do {} eat?|Where do {} live?|How do {} take care of their young?|Tell me something interesting about {}.",
        "penguins, elephants, dolphins, owls, bees, ants, spiders, wolves, foxes, bears, tigers, lions, giraffes, "
        "zebras, kangaroos, koalas, pandas, gorillas, chimpanzees, whales, sharks, octopuses, seahorses, turtles, "
        "crocodiles, snakes, frogs, salamanders, eagles, hawks, parrots, flamingos, swans, ducks, geese, crows, "
        "hummingbirds, bats, squirrels, rabbits, hedgehogs, beavers, otters, seals, walruses, polar bears, "
        "camels, llamas, goats, sheep, cows, horses, donkeys, pigs, moles, butterflies, dragonflies, fireflies, "
        "crickets, snails",
    ),
    Theme(
        "What is {}?|Can you explain {} to a ten-year-old?|Why is {} important?|How was {} discovered?",
        "gravity, photosynthesis, evaporation, electricity, magnetism, evolution, friction, inertia, oxygen, "
        "carbon dioxide, DNA, natural selection, the water cycle, the ozone layer, plate tectonics, erosion, "
        "condensation, osmosis, digestion, the immune system, the nervous system, radioactivity, nuclear fusion, "
        "solar energy, wind power, sound, infrared light, static electricity, buoyancy, momentum, entropy, the "
        "greenhouse effect, pollination, fermentation, rust, combustion, acid rain, the Milky Way, the solar "
        "system, dark matter, black holes, relativity, quantum mechanics, the periodic table, the atom, "
        "antibiotics, vaccination, insulin, hibernation, migration, camouflage, symbiosis, biodiversity, the food "
        "chain, the carbon cycle, air pressure, humidity, tides, eclipses, the scientific method",
    ),
    Theme(
        "How do I clean {}?|How often should I replace {}?|What should I look for when I buy {}?|Where is the "
        "best place to store {}?",
        "a cast iron pan, a leather sofa, a wooden table, a bathroom mirror, a shower curtain, a mattress, a "
        "pillow, a wool sweater, a winter coat, running shoes, a backpack, a toothbrush, a kitchen sponge, a "
        "cutting board, a coffee maker, a kettle, a toaster, a microwave oven, a refrigerator, a dishwasher, a "
        "washing machine, a vacuum cleaner, a carpet, curtains, window blinds, a ceiling fan, an air filter, a "
        "smoke detector, a flashlight, batteries, a doormat, a garden hose, a lawn mower, a bicycle, a tent, a "
        "sleeping bag, a raincoat, an umbrella, sunglasses, a wristwatch, silver jewelry, a laptop, a keyboard, "
        "headphones, a camera, a television, a piano, a guitar, kitchen knives, wine glasses, a frying pan, a "
        "rice cooker, a blender, an iron, towels, bed sheets, a yoga mat, dumbbells, a desk lamp, an office chair",
    ),
    Theme(
        "How can I get better at {}?|I want to start {}. Any advice?|Is {} hard to learn?|How much time a week "
        "does {} take?",
        "painting, swimming, running, cycling, photography, knitting, sewing, woodworking, pottery, chess, public "
        "speaking, drawing, calligraphy, singing, playing the violin, playing the drums, playing the flute, "
        "juggling, dancing, yoga, meditation, rock climbing, skiing, snowboarding, surfing, sailing, fishing, "
        "hiking, camping, birdwatching, gardening, baking, brewing beer, making cheese, writing poetry, writing "
        "short stories, keeping a journal, speed reading, touch typing, programming, web design, video editing, "
        "learning Spanish, learning Japanese, learning French, sign language, mental arithmetic, solving "
        "crosswords, origami, magic tricks, archery, fencing, tennis, table tennis, basketball, volleyball, ice "
        "skating, horseback riding, embroidery, beekeeping",
    ),
    Theme(
        "What should I see in {}?|When is the best time to visit {}?|What food is {} known for?|How many days "
        "should I plan for {}?",
        "Paris, Rome, London, Tokyo, New York, Barcelona, Berlin, Vienna, Prague, Budapest, Lisbon, Madrid, "
        "Amsterdam, Copenhagen, Stockholm, Oslo, Helsinki, Dublin, Edinburgh, Athens, Istanbul, Cairo, Marrakesh, "
        "Cape Town, Nairobi, Mumbai, Delhi, Bangkok, Singapore, Hong Kong, Seoul, Beijing, Shanghai, Sydney, "
        "Melbourne, Auckland, Toronto, Montreal, Vancouver, Chicago, San Francisco, Boston, New Orleans, Miami, "
        "Seattle, Mexico City, Havana, Lima, Buenos Aires, Rio de Janeiro, Santiago, Iceland, Scotland, Sicily, "
        "Crete, Bali, Hawaii, Kyoto, Venice, Florence",
    ),
    Theme(
        "What does {} do all day?|How do I become {}?|What skills does {} need?|Is it stressful to be {}?",
        "a nurse, a teacher, a firefighter, a police officer, a pilot, a flight attendant, a chef, a baker, a "
        "butcher, a farmer, a florist, a carpenter, a plumber, an electrician, a mechanic, an architect, a civil "
        "engineer, a software developer, a data analyst, an accountant, a lawyer, a judge, a journalist, an "
        "editor, a translator, a librarian, a museum curator, a historian, an archaeologist, a biologist, a "
        "chemist, a physicist, an astronomer, a veterinarian, a dentist, a pharmacist, a surgeon, a psychologist, "
        "a social worker, a physical therapist, a personal trainer, a coach, a musician, an actor, a film "
        "director, a photographer, a graphic designer, a fashion designer, a hairdresser, a tailor, a real estate "
        "agent, a travel agent, a bank teller, an economist, a diplomat, a soldier, a ship captain, a truck "
        "driver, a postal worker, a zookeeper",
    ),
    Theme(
        "What helps against {}?|How do I deal with {}?|What causes {}?|Should I see a doctor about {}?",
        "a headache, back pain, a sore throat, a cold, hay fever, insomnia, stress, homesickness, stage fright, "
        "procrastination, loneliness, jet lag, motion sickness, a sunburn, dry skin, chapped lips, hiccups, "
        "snoring, heartburn, a stomach ache, muscle cramps, a stiff neck, tired eyes, cold feet, a mosquito bite, "
        "a bee sting, a blister, a bruise, a nosebleed, dandruff, bad breath, toothache, forgetfulness, lack of "
        "focus, low energy, nervousness, anger, grief, jealousy, shyness, boredom, burnout, exam nerves, fear of "
        "flying, fear of spiders, fear of heights, bad dreams, noisy neighbors, a bad mood, a difficult boss, too "
        "much screen time, a sweet tooth, a sprained ankle, a fever, a cough, a runny nose, a hangover, "
        "dehydration, nail biting, poor posture",
    ),
    Theme(
        "Who invented {}?|What did people use before {}?|How did {} change everyday life?|How does {} work?",
        "the telephone, the printing press, the light bulb, the steam engine, the telegraph, the airplane, the "
        "sundial, the radio, the windmill, the computer, the internet, the microscope, the telescope, the "
        "compass, the clock, the calendar, paper money, the credit card, the postage stamp, the typewriter, the "
        "sewing machine, the cash register, the vending machine, the fountain pen, the elevator, the escalator, "
        "the traffic light, the seat belt, the zipper, the safety pin, the button, the kite, eyeglasses, contact "
        "lenses, the thermometer, the stethoscope, the X-ray machine, penicillin, the vaccine, the battery, the "
        "electric motor, the solar panel, the wind turbine, the nuclear reactor, the submarine, the helicopter, "
        "the hot air balloon, the rocket, the satellite, the barcode, the pencil, the ballpoint pen, the "
        "chalkboard, the plow, the wheel, the lock, the tin can, the match, the parachute, the loom",
    ),
)


class Topic(NamedTuple):
    """A topic and the templates of its theme."""

    name: str
    templates: tuple[str, ...]


def list_topics() -> list[Topic]:
    """Return all topics, shuffled with a fixed seed."""
    topics = [
        Topic(name.strip(), tuple(theme.templates.split("|"))) for theme in THEMES for name in theme.topics.split(",")
    ]
    random.Random(SPLIT_SEED).shuffle(topics)
    return topics


def iter_all_questions(topics: Iterable[Topic]) -> Iterator[str]:
    """Yield every question about each topic."""
    for topic in topics:
        yield from (template.format(topic.name) for template in topic.templates)


def iter_single_questions(topics: Iterable[Topic], rng: random.Random) -> Iterator[str]:
    """Yield one question about each topic, so that the answers are independent observations."""
    for topic in topics:
        yield rng.choice(topic.templates).format(topic.name)


def write_questions(path: Path, questions: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions), encoding="utf-8")


def main(folder: Path) -> None:
    topics = list_topics()
    rng = random.Random(SPLIT_SEED)
    measured = topics[:MEASURED_TOPICS]
    tuning = topics[MEASURED_TOPICS : MEASURED_TOPICS + TUNING_TOPICS]
    training = [*iter_all_questions(topics[MEASURED_TOPICS + TUNING_TOPICS :])]
    rng.shuffle(training)
    folder.mkdir(parents=True, exist_ok=True)
    write_questions(folder / "training.jsonl", training)
    write_questions(folder / "tuning.jsonl", iter_single_questions(tuning, rng))
    write_questions(folder / "measured.jsonl", iter_single_questions(measured, rng))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
