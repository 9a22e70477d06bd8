"""The level-triggered engine: store, queue, reconciler, relister, elector. It knows kinds only by their KindSpec."""
