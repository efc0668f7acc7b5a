"""Words and facts that instructions are about; every fact is the same wherever it is asked for."""

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Mia", "Tom")
COLOURS = ("black", "blue", "brown", "green", "red", "white", "yellow")
PLACES = ("bakery", "beach", "forest", "garden", "library", "market", "park", "school")
SPOTS = ("behind the door", "in the box", "near the window", "on the shelf", "under the table")

GROUPS = {  # members of a group, none of which belongs to another group
    "fruit": ("banana", "cherry", "lemon", "melon", "peach", "pear", "plum"),
    "animal": ("bee", "cat", "cow", "crow", "dog", "duck", "frog", "horse", "lion", "mouse", "sheep", "wolf"),
    "tool": ("broom", "hammer", "knife", "pen", "saw", "spoon"),
    "garment": ("coat", "hat", "scarf", "shirt", "skirt", "sock"),
    "vehicle": ("boat", "bus", "car", "plane", "train", "truck"),
}
WORDS = tuple(word for members in GROUPS.values() for word in members)
THINGS = ("ball", "book", "chair", "cup", "key", "lamp", *GROUPS["tool"], *GROUPS["garment"])

PLURALS = {"animal": "animals", "fruit": "fruits", "tool": "tools", "garment": "garments", "vehicle": "vehicles"}
PLURALS |= {
    "cherry": "cherries",
    "knife": "knives",
    "mouse": "mice",
    "scarf": "scarves",
    "sheep": "sheep",
    "wolf": "wolves",
}
PLURALS |= {"peach": "peaches", "bus": "buses"}
PLURALS |= {word: f"{word}s" for word in (*WORDS, *THINGS) if word not in PLURALS}

# animal: its sound, where it lives, what it eats, what it looks like, what it likes
ANIMALS = {
    "bee": ("buzzes", "in a hive", "nectar", "small and yellow", "to fly from flower to flower"),
    "cat": ("meows", "in a house", "fish", "soft and quiet", "to sleep in the sun"),
    "cow": ("moos", "in a barn", "grass", "big and calm", "to stand in the shade"),
    "crow": ("caws", "in a tree", "seeds", "black and clever", "to sit on the roof"),
    "dog": ("barks", "in a kennel", "meat", "loyal and loud", "to run after a ball"),
    "duck": ("quacks", "on a pond", "bread", "small and round", "to swim in a row"),
    "frog": ("croaks", "in a pond", "flies", "green and wet", "to jump into the water"),
    "horse": ("neighs", "in a stable", "hay", "tall and strong", "to run across the field"),
    "lion": ("roars", "in the grassland", "meat", "strong and proud", "to sleep after a meal"),
    "mouse": ("squeaks", "in a hole", "cheese", "small and grey", "to hide in the wall"),
    "sheep": ("bleats", "in a field", "grass", "white and soft", "to stay with the others"),
    "wolf": ("howls", "in the forest", "meat", "grey and wild", "to run in the snow"),
}
# thing: what it is used for, what it is made of
USES = {
    "ball": ("play in the garden", "rubber"),
    "book": ("learn about the world", "paper"),
    "broom": ("sweep the floor", "wood"),
    "chair": ("sit at the table", "wood"),
    "coat": ("stay warm in winter", "wool"),
    "cup": ("drink tea", "clay"),
    "hammer": ("drive nails into the wall", "iron"),
    "key": ("open a door", "iron"),
    "knife": ("cut bread", "steel"),
    "lamp": ("read at night", "glass"),
    "pen": ("write letters", "plastic"),
    "saw": ("cut wood", "steel"),
    "spoon": ("eat soup", "steel"),
}
OPPOSITES = {
    "big": "small",
    "dark": "light",
    "early": "late",
    "empty": "full",
    "fast": "slow",
    "hard": "soft",
    "high": "low",
    "hot": "cold",
    "loud": "quiet",
    "old": "new",
    "strong": "weak",
    "wet": "dry",
}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
ADJECTIVES = ("big", "brave", "hungry", "loud", "old", "quiet", "slow", "small", "strong", "wet")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# verb: its past, its infinitive
VERBS = {
    "walks to": ("walked to", "walk to"),
    "runs to": ("ran to", "run to"),
    "goes to": ("went to", "go to"),
    "cycles to": ("cycled to", "cycle to"),
    "drives to": ("drove to", "drive to"),
}
TROUBLES = {  # a state: what to do about it
    "bored": ("read a book", "visit a friend", "play with a ball", "learn to paint"),
    "cold": ("put on a coat", "drink hot tea", "close the window", "sit near the fire"),
    "hungry": ("eat a pear", "make a soup", "go to the bakery", "have some bread"),
    "sad": ("call a friend", "walk in the park", "listen to music", "take a deep breath"),
    "thirsty": ("drink some water", "make tea", "have a glass of milk", "eat a melon"),
    "tired": ("go to bed early", "take a short rest", "sleep for an hour", "stay at home"),
}
REASONS = {  # an action: why somebody does it
    "takes a lamp": ("it is dark outside", "the light in the house is broken"),
    "closes the window": ("it is cold outside", "the street is loud"),
    "goes to the market": ("there is no fruit left", "friends come to dinner"),
    "puts on a scarf": ("the wind is cold", "it is winter"),
    "stays in bed": ("it is late", "the day was long"),
    "runs to the bus": ("it is late", "the bus leaves soon"),
}
RECIPES = {  # what is made: its steps
    "tea": ("boil some water", "put the tea into a cup", "pour the water into the cup", "wait for three minutes"),
    "a fruit salad": ("wash the fruit", "cut the fruit into small parts", "put it into a bowl", "add some lemon"),
    "soup": ("cut the carrots", "boil some water", "put the carrots into the water", "add salt"),
    "a paper boat": ("take a sheet of paper", "fold it in the middle", "fold the corners", "open the boat"),
}
