"""Tokens to text, piece by piece: characters that span several tokens, stop strings, growing rows."""
