"""A small visual world with questions: seeded scenes of coloured things on cluttered grounds, and what one can ask.

world.py      what exists: colours, shapes, patterns, sizes, characters, grounds; scenes drawn at random from it
draw.py       a scene as pixels, and which thing owns each of them
questions.py  questions about a scene in varied English, each with the one answer that is right
"""
