"""What every HTTP part shares: OpenAI's types, streams, errors, keys, limits. Knows no model. Needs moedge[serve]."""
