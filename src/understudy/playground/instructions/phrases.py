"""Ways to say the same: `[greeting]` in a response stands for one of these phrases, drawn at random."""

PHRASES = {
    "greeting": ("Hello {name}", "Dear {name}", "Good morning {name}", "Hi {name}"),
    "wish": ("I hope you are well.", "How are you today?", "It is good to see you.", "I wish you a nice day."),
    "opening": (
        "One day {name} found a {animal} in the {place}.",
        "{name} lived near the {place} with a {animal}.",
        "On {day} {name} met a {animal} in the {place}.",
        "Once a {animal} followed {name} to the {place}.",
    ),
    "event": (
        "It was {adjective} and very hungry.",
        "The {animal} had lost its way.",
        "They played until it was dark.",
        "{name} gave it some {food}.",
        "The {animal} took the {thing} and ran away.",
        "Then it began to rain.",
    ),
    "ending": (
        "In the end they were friends.",
        "{name} was happy.",
        "They went home together.",
        "After that nobody saw the {animal} again.",
    ),
    "sentence": (
        "{name} says that the {animal} likes {likes}.",
        "{name} has a {adjective} {animal}.",
        "Yesterday {name} saw a {animal} in the {place}.",
        "{name} has a {animal} that lives {home}.",
        "The {animal} of {name} eats {food}.",
    ),
    "advice": (
        "{name} should {first}.",
        "It helps to {first}.",
        "{name} could {first} or {second}.",
        "I would {first} and then {second}.",
    ),
    "thanks": (
        "Thank you for the {thing}.",
        "Many thanks for the {colour} {thing}.",
        "I am very happy about the {colour} {thing}.",
    ),
    "praise": (
        "It is just what I needed.",
        "I will use it every day.",
        "It looks very nice.",
        "You are a good friend.",
    ),
    "invitation": (
        "Please come to the {place} on {day}.",
        "I invite you to the {place} on {day}.",
        "Let us meet in the {place} on {day}.",
    ),
    "plan": ("We will eat soup and play.", "There will be tea and music.", "Bring a {thing} if you can."),
    "because": ("Because {reason}.", "{name} does that because {reason}.", "I think that {reason}."),
}
