// Package real holds the agent's tests with real containers, a real API and a real store. They are a package of their own
// because they link all of that, and need root.
package real
