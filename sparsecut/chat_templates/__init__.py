"""Chat templates: conversations to text, arguments, turn markers, and thoughts before answers."""
