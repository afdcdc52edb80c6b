"""The benchmark study: attribution methods x metrics on single images and on grids."""
