"""Speed and memory beside the floor and beside other tools; `make bench` runs everything here."""
