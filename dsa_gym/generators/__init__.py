"""Generated users, so that everything works offline: persona text, tastes in a catalogue, hands that draw."""
