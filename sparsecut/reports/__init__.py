"""Pages about finished work: jinja2 templates, matplotlib figures as SVG, tables."""
