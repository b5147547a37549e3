"""Pipeline parallelism: pure schedules of actions, a simulator, and a runtime that executes them."""
