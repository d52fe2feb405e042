"""Clusters that others start, as files for them: KubeRay's resources, and `ray up`'s configuration."""
