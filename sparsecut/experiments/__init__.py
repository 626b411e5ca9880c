"""Many runs: studies, searches, comparisons."""
