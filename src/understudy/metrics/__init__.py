"""One metric, one file: how good an answer is, given its references."""
