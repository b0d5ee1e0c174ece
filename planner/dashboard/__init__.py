"""The pages of the dashboard: widgets, a call to the planner or the simulator, charts. Nothing is worked out here."""
