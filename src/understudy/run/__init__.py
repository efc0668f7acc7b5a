"""A run of a recipe: built, checked, trained and saved in one folder."""
