// Package pause lets a long piece of work in a request leave a processor to others now and then.
//
// Go's runtime looks for what has come in from the network when a processor has nothing to do, else every 10 ms. So work of ten
// milliseconds on each processor is ten in front of each step of anybody else's request, however small; in parts of one, with pauses between them,
// it is one. Who knows whether others wait (node/api's turns) puts a Rester into the context; who works long (lists, their compression) asks for
// pauses. A Work is used by one goroutine at a time.
package pause

import (
	"context"
	"time"
)

// part is how long a part of the work takes at least.
const part = time.Millisecond

// Rester pauses for a while if others need the processor, after somebody has worked for so long.
type Rester interface{ Rest(worked time.Duration) }

// Key is that of the Rester among a context's values.
type Key struct{}

// Work is a long piece of work.
type Work struct {
	rester Rester
	began  time.Time // of this part
}

// Begin begins to work; nil when nobody would have it pause.
func Begin(ctx context.Context) *Work {
	r, ok := ctx.Value(Key{}).(Rester)
	if !ok {
		return nil
	}
	return &Work{r, time.Now()}
}

// Pause is called between steps of the work, of a fraction of a millisecond each. It may take as long as the part that has ended.
func (w *Work) Pause() {
	if w == nil {
		return
	}
	if worked := time.Since(w.began); worked >= part {
		w.rester.Rest(worked)
		w.began = time.Now()
	}
}
