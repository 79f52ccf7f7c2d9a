"""Attention of one sequence on several processes, against one."""
