"""Quality of an explanation against the images that it cost: searches by budget, published searches, and sampling methods."""
