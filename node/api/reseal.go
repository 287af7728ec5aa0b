package api

import (
	"context"

	"skein.io/skein/node/api/store"
)

// Reseal goes through what is stored and writes anew what is not sealed as this server would seal it now: plain values of resources
// that are to be sealed, and values sealed by an older key. One caller in the cluster is enough; requests carry the context's values.
// See store.Factory.Reseal. It may be called once Ready is closed.
func (s *Server) Reseal(ctx context.Context, o store.ResealOptions) (store.Usage, int, error) {
	return s.build.stores.Reseal(ctx, o)
}
