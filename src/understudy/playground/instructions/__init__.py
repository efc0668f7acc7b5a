"""The instruction task: kinds of instruction, the words and facts that they are about, and their rows."""
