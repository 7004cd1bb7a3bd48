"""Compromise drills: one part of a fleet is in an enemy's hands, and does what it can."""
