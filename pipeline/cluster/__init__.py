"""Jobs for clusters, and what they will take."""
