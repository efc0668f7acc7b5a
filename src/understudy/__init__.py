"""understudy: teach a small language model to play the big one's part."""
