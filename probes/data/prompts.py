"""Built-in everyday prompts, written for this project: the default prompts for training and verifying a bake.

The digest of a prompt decides whether it is for training or held out, so adding one does not move the others.
"""

from __future__ import annotations

from vectors.storage.files import digest_bytes

PROMPTS = (
    "How do I get red wine out of a carpet?", "Explain why the sky is blue.", "What should I cook for dinner tonight?",
    "My flight was cancelled.", "Write a short note to thank a colleague.", "How do vaccines work?",
    "I can't sleep.", "Give me three names for a bakery.", "What is the difference between a virus and a bacterium?",
    "Describe a walk through a forest.", "How much water should I drink a day?", "I am learning to play the guitar.",
    "Summarise the story of Romeo and Juliet.", "What is compound interest?", "Recommend a book about the sea.",
    "My neighbour plays loud music.", "How do I tie a bow tie?", "What makes bread rise?", "I forgot my password.",
    "Plan a day in a city you like.", "Why do leaves change colour in autumn?", "How do I start running?",
    "Translate 'good morning' into French.", "What causes thunder?", "I have a job interview tomorrow.",
    "How do I remove a splinter?", "Tell me about the moon.", "What is a good gift for a teacher?",
    "My computer is slow.", "How do bees make honey?", "Should I rent or buy a flat?", "What is photosynthesis?",
    "I want to write a poem about rain.", "How can I save money each month?", "What happened in 1969?",
    "I feel nervous about a speech.", "How do I boil an egg?", "What is the capital of Peru?",
    "Explain gravity to a child.", "My plant is dying.", "List some uses for baking soda.", "How do magnets work?",
    "I lost a chess game.", "What should I pack for a camping trip?", "Why is exercise good for the heart?",
    "Write a headline about a new park.", "How do I clean a cast-iron pan?", "What is an algorithm?",
    "I moved to a new town.", "How are rainbows formed?", "Give me advice on learning Spanish.",
    "What is the tallest mountain?", "My sister is getting married.", "How does a bicycle stay upright?",
    "Suggest a game for two children.", "What does a lawyer do?", "I burned the rice.", "How do I write a CV?",
    "Why do cats purr?", "What is inflation?", "Describe your favourite season.", "How do I fix a dripping tap?",
    "I finished my first marathon.", "What is the speed of light?", "How can I make friends at work?",
    "Tell me how a rocket flies.", "My phone screen is cracked.", "What is a healthy breakfast?",
    "How do I calm a crying baby?", "Why was the Great Wall built?", "I am thinking about a career change.",
    "What are prime numbers?", "How do I grow tomatoes?", "Write two lines about a lighthouse.", "What is jazz?",
    "I missed the last bus.", "How do I apologise to a friend?", "What lives in the deep sea?",
    "Explain how a bill becomes a law.", "My dog won't eat.", "What is a good way to study?", "How old is the Earth?",
    "I got a bad mark.", "Name some famous painters.", "How do I make coffee without a machine?",
    "Why do we dream?", "What is the best way to clean windows?", "I am visiting my grandmother.",
    "How does a fridge work?", "What should I know about the stock market?", "Describe a busy market.",
    "How do I change a tyre?", "What is a black hole?", "I want to learn to draw.", "Why is the sea salty?",
    "Help me choose a film.", "How do I write a formal letter?", "What is the meaning of 'ubiquitous'?",
    "My back hurts from sitting.", "How do I teach a dog to sit?", "What was the Renaissance?",
)  # fmt: skip


# Openings of texts that are not conversations: a behaviour should not show in them; replay data continue them.
OPENINGS = (
    "The city was founded in the twelfth century", "def add(a, b):\n    ", "Photosynthesis takes place in",
    "Article 1. This agreement", "Preheat the oven to 180 degrees.", "In mathematics, a group is",
    "The train left the station at", "Abstract: We study", "Table of contents\n1.", "The river rises in the hills",
    "import os\n\nfor name in", "Minutes of the meeting held on", "According to the census,",
    "The heart has four chambers",
    "Once upon a time there was", "Installation. First,", "The novel was published in", "Water boils at",
    "The species is found in", "for i in range(10):\n", "The treaty was signed by",
    "To calculate the area of a circle,",
    "The committee decided that", "Gold is a chemical element", "SELECT name FROM", "The bridge connects",
    "During the nineteenth century,", "The engine consists of", "Definition. A number is prime if", "The island lies",
    "Chapter One\n\n", "The orchestra was conducted by", "Sodium chloride is", "The museum holds", "Rule 1:",
    "The algorithm sorts the list by", "Winters in the region are", "The bill was passed", "A triangle has",
    "Volcanoes form",
)  # fmt: skip


def _held_out(prompt: str) -> bool:
    return int(digest_bytes(prompt.encode())[7:15], 16) % 4 == 0


def for_training() -> list[str]:
    """The prompts that training may use: about three quarters."""
    return [prompt for prompt in PROMPTS if not _held_out(prompt)]


def held_out() -> list[str]:
    """The prompts that nothing is trained on: for proofs and comparisons."""
    return [prompt for prompt in PROMPTS if _held_out(prompt)]


def general(*, held_out: bool) -> list[str]:
    """The openings that nothing is trained on, or with `held_out` False those that training may use."""
    return [opening for opening in OPENINGS if _held_out(opening) == held_out]
