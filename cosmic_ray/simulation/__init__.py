"""Simulated plates: microscope fields whose every nucleus is known. For quickstart, tests and planted truths only."""
