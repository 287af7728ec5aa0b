package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"k8s.io/client-go/rest"

	"skein.io/skein/node/client"
)

// localNode stands for the node itself in URLs that go through its socket.
const localNode = "localhost"

// agedAnswers bounds how old an answer may be. It is the value of the flag --max-age.
type agedAnswers struct {
	max *time.Duration
	// socket is the local node's, when it is to be asked what it knows by itself.
	socket string
}

func (a *agedAnswers) String() string {
	if a.max == nil {
		return ""
	}
	return a.max.String()
}

func (a *agedAnswers) Type() string { return "duration" }

func (a *agedAnswers) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil {
		return err
	}
	if d < 0 {
		return fmt.Errorf("%s is negative", d)
	}
	a.max = &d
	return nil
}

// wrap makes clients ask for what the flag says.
func (a *agedAnswers) wrap(c *rest.Config) *rest.Config {
	if a.socket != "" {
		c.Host, c.TLSClientConfig = "http://"+localNode+client.LastKnownPath, rest.TLSClientConfig{}
		c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", a.socket)
		}
	}
	if a.max != nil {
		c.Wrap(func(rt http.RoundTripper) http.RoundTripper { return agedTransport{rt, *a.max} })
	}
	return c
}

type agedTransport struct {
	http.RoundTripper
	max time.Duration
}

// RoundTrip implements http.RoundTripper.
func (t agedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodGet {
		return t.RoundTripper.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.Header.Set(client.MaxAgeHeader, strconv.Itoa(int(t.max/time.Second)))
	resp, err := t.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusServiceUnavailable {
		resp.Header.Del("Retry-After") // client-go would ask ten times more; whoever gives a bound wants to know now
	}
	// A node that does not know the bound is held to it all the same.
	if age, err := strconv.Atoi(resp.Header.Get(client.AgeHeader)); err == nil && time.Duration(age)*time.Second > t.max {
		resp.Body.Close()
		return nil, fmt.Errorf("the answer is %d s old, and at most %s was asked for with --max-age", age, t.max)
	}
	return resp, nil
}
