"""What DVC runs: data, training, notebooks, claims, paper and report, and the profiles that set their sizes."""
