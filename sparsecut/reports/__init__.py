"""Pages about results: jinja2 templates, matplotlib figures as SVG, tables."""
