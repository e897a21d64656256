"""What the routers do: a log of every token's experts, statistics of it, the experts' weights, figures, a page."""
