"""Tests on several real processes, joined over gloo."""
