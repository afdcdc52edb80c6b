"""Figures of explanations; they draw what they are given and are imported by nobody below them."""
