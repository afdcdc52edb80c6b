"""The misclassified images of a data set: each is explained, causes are compared and clustered, and an atlas shows them all."""
