"""Figures of explanations. They depend on nothing above them: Protocols in ``drawn`` say what they draw."""
