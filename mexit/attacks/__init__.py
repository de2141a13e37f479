"""Attacks: one gradient loop (`gradient`), and what it climbs (`objective`)."""
