"""Ground truth: block-model graphs, jumper rules, walks that obey them, and the scorer."""
