// Package linger lets those who answer over a connection say that what they write now may go out together with what others write on it in
// the same moment. It keeps nothing. A front puts a connection into the context of its requests, whoever serves a watch takes it from there;
// any goroutine may call a Conn.
package linger

import "context"

// Conn is a connection that can write in larger pieces.
type Conn interface {
	// Linger says that somebody is about to write what others may join.
	Linger()
}

type key struct{}

// With puts a connection into a context.
func With(ctx context.Context, c Conn) context.Context { return context.WithValue(ctx, key{}, c) }

// From gives the connection of a context; nil when it has none that can linger.
func From(ctx context.Context) Conn {
	c, _ := ctx.Value(key{}).(Conn)
	return c
}
