"""The method: train image classifiers on data nobody vouches for. Knows nothing of the platform around it."""
