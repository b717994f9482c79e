"""Engines the profiler can measure, behind one small interface (`base.Engine`)."""
