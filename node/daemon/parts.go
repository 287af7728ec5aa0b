package daemon

import (
	"slices"
	"sync"

	"skein.io/skein/node/client"
)

// parts is the health of the node's parts, in the order in which they first reported.
type parts struct {
	mu sync.Mutex // guards l
	l  []client.Part
}

// set reports that a part is well (nil) or why it is not; message is shown when it is well.
func (p *parts) set(name string, err error, message string) {
	part := client.Part{Name: name, Healthy: err == nil, Message: message}
	if err != nil {
		part.Message = err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.IndexFunc(p.l, func(x client.Part) bool { return x.Name == name }); i >= 0 {
		p.l[i] = part
		return
	}
	p.l = append(p.l, part)
}

func (p *parts) list() []client.Part {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.l)
}
