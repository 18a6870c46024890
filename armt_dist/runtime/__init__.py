"""Carries out a program on one rank."""
