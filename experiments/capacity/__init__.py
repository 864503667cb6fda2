"""Resolution or compute? PaliGemma's resize-down-then-up experiment (arXiv:2407.07726, section 5.7.1)."""
