"""raylign: post-train language models on a Ray cluster and serve what was trained."""
