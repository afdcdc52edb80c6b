"""The misclassified samples of a data set: each explained, causes compared and clustered, and an atlas to look through."""
