"""How good generated networks are, and whether they are copies: accuracy, similarity, baselines, report."""
