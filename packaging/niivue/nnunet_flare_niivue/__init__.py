"""NiiVue, unchanged, and the licences of what it holds. ``nnunet_flare.report.viewer`` copies both into a report."""
