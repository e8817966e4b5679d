"""Tokens to text, piece by piece: characters that several tokens spell, stop strings, rows as they grow."""
