"""What a run says about itself: meters, trackers, progress and the HTML report."""
